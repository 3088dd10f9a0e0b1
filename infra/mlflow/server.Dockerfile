# syntax=docker/dockerfile:1
# MLflow's server with what authentication, Postgres and S3 need; built by compose.yaml from the repository's root.
ARG PYTHON_BASE=python:3.11.14-slim-bookworm
FROM ${PYTHON_BASE}
RUN --mount=type=bind,source=infra/mlflow/requirements.lock,target=/build/requirements.lock \
    pip install --no-cache-dir --no-compile --require-hashes --requirement /build/requirements.lock \
    && useradd --uid 1000 --user-group --create-home --shell /usr/sbin/nologin mlflow
COPY infra/mlflow/basic_auth.ini /etc/mlflow/basic_auth.ini
ENV MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic_auth.ini \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
CMD ["mlflow", "--version"]
