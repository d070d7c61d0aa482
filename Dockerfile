# One image for the web (Apache) and one for the model server. compose.yaml runs both with a Redis.
#
#   docker build --target web -t keras-rest-api-web .
#   docker build --target model -t keras-rest-api-model .
#   docker build --target model --build-arg REQUIREMENTS=requirements/gpu.txt -t keras-rest-api-model .   # NVIDIA
#
# Packages come before the code, so that a change to the code does not reinstall them.
ARG BASE=debian:12-slim

FROM ${BASE} AS base
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/keras-rest-api
COPY requirements/web.txt requirements/constraints.txt requirements/
RUN /usr/bin/python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-input -r requirements/web.txt -c requirements/constraints.txt
# Without PYTHONUNBUFFERED, the last log lines of a killed program would be lost.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM base AS web
# The distribution's mod_wsgi is built for the distribution's Python, so .venv uses that Python.
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends apache2 libapache2-mod-wsgi-py3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o www-data -g www-data /run/keras-rest-api
COPY . .
USER www-data
# Values of Apache's site: one process per core, 640 threads in total, and MAX_UPLOAD_BYTES if you change that setting.
ENV APP_PORT=8080 RUN_DIR=/run/keras-rest-api APACHE_DEFINES="WEB_PROCESSES=4 WEB_THREADS=160"
EXPOSE 8080
# On this signal Apache accepts no new requests, answers those in flight, and ends.
STOPSIGNAL SIGWINCH
# The check itself ends REQUEST_TIMEOUT + 10 s after it begins; the longest REQUEST_TIMEOUT is 240 s.
HEALTHCHECK --interval=10s --timeout=260s --start-period=30s \
    CMD [".venv/bin/python", "deploy/container_health.py", "web"]
CMD ["deploy/apache/run-private"]

FROM base AS model
ARG REQUIREMENTS=requirements/service.txt
COPY requirements requirements
RUN .venv/bin/pip install --no-cache-dir --no-input -r ${REQUIREMENTS} -c requirements/constraints.txt
# A fixed number, which deploy/kubernetes names.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keras-rest-api \
    && install -d -o keras-rest-api -g keras-rest-api /var/cache/keras-rest-api
COPY . .
USER keras-rest-api
# Keras keeps downloaded weights here, in a volume.
ENV KERAS_HOME=/var/cache/keras-rest-api
VOLUME /var/cache/keras-rest-api
# Healthy once it has a heartbeat. A large model takes minutes to load, and longer if its weights must be downloaded.
HEALTHCHECK --interval=10s --timeout=10s --start-period=20m \
    CMD [".venv/bin/python", "deploy/container_health.py", "model"]
# Becomes the launcher of run_model_server.py. If neither MODEL nor MODELS is set, it chooses a model first.
CMD [".venv/bin/python", "deploy/default_model.py", "--gpu", "0"]
