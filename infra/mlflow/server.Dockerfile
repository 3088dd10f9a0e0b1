# syntax=docker/dockerfile:1
# MLflow's server with what authentication, Postgres and S3 need; built by compose.yaml from the repository's root.
FROM python:3.11.14-slim-bookworm
RUN --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=bind,source=infra/mlflow/requirements.txt,target=/build/requirements.txt \
    pip install --no-cache-dir --no-compile --constraint /build/requirements.lock --requirement /build/requirements.txt \
    && useradd --uid 1000 --user-group --create-home --shell /usr/sbin/nologin mlflow
COPY infra/mlflow/basic_auth.ini /etc/mlflow/basic_auth.ini
ENV MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/basic_auth.ini \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
CMD ["mlflow", "--version"]
