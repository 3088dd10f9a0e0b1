# The S3-compatible store as a user of its own: a named volume takes its owner from the folder in the image.
ARG STORE_BASE=chrislusf/seaweedfs:3.97
FROM ${STORE_BASE}
RUN mkdir /store && chown 1000:1000 /store
USER 1000:1000
