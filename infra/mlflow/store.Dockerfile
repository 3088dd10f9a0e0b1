# The S3-compatible store as a user of its own: a named volume takes its owner from the folder in the image.
FROM chrislusf/seaweedfs:3.97
RUN mkdir /store && chown 1000:1000 /store
USER 1000:1000
