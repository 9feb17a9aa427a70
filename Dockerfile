# The image of the composed stack: Dagster's services, the MLflow server, and the generation service before there is a
# Bento. `make stack-image` prepares var/stack/packages (`llm_assets/containers/stack.py`) and builds this.
#
# The build fetches and compiles nothing, so it needs no network, no package index and no credentials.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# Runs in other containers or Pods start with `python3 -m dagster`: the command `dagster` is not here.
ENV LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app:/app/packages \
    HOME=/tmp \
    USER=rex \
    BENTOML_DO_NOT_TRACK=True \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    GOMP_SPINCOUNT=20000 \
    HYDRA_FULL_ERROR=0 \
    DAGSTER_HOME=/app/deploy \
    DAGSTER_USE_PYTHON_ENVIRONMENT_ENTRY_POINT=1 \
    DAGSTER_FILES=/var/lib/rex/dagster \
    LLM_ASSETS_VAR=/var/lib/rex \
    BENTOML_HOME=/var/lib/rex/bentoml

# Folders of volumes: a new volume takes its owner from here.
RUN mkdir -p /var/lib/rex /var/lib/mlflow && chown 10001:10001 /var/lib/rex /var/lib/mlflow

# Layers that change rarely come first. Bytecode is compiled here because the user cannot write it: otherwise each start
# would compile for a minute. Not of other architectures' models, a fifth of the source, of which a run imports none or
# one. Some packages ship templates that are not Python; their compilation may fail.
COPY var/stack/packages /app/packages
RUN python3 -m compileall -q -j 0 -x '/tests/|/torch/testing/_internal/|/transformers/models/(?!auto/)' /app/packages || true
COPY var/stack/supply /app/supply
COPY bentofile.yaml constraints.txt pyproject.toml README.md /app/
COPY configs /app/configs
COPY deploy /app/deploy
COPY model /app/model
COPY bento /app/bento
COPY bench /app/bench
COPY llm_assets /app/llm_assets
RUN python3 -m compileall -q /app/model /app/bento /app/bench /app/llm_assets

WORKDIR /app
USER 10001:10001
EXPOSE 3000
CMD ["python3", "-m", "bentoml", "serve", "bento.service:RexService", "--host", "0.0.0.0", "--port", "3000"]
