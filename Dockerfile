# The two programs, an image each: the web (Apache) and the model server. compose.yaml runs them with a Redis.
#
#   docker build --target web -t keras-rest-api-web .
#   docker build --target model -t keras-rest-api-model .
#   docker build --target model --build-arg REQUIREMENTS=requirements/gpu.txt -t keras-rest-api-model .   # NVIDIA
#
# Packages come before the code, so that a change of the code installs none again.
ARG BASE=debian:12-slim

FROM ${BASE} AS base
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/keras-rest-api
COPY requirements/web.txt requirements/constraints.txt requirements/
RUN /usr/bin/python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --no-input -r requirements/web.txt -c requirements/constraints.txt
# Of the image, not of a setting: where the log of a program that was killed would else be lost.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM base AS web
# The distribution's mod_wsgi is built for the distribution's Python, which the .venv is made with.
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends apache2 libapache2-mod-wsgi-py3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o www-data -g www-data /run/keras-rest-api
COPY . .
USER www-data
# APACHE_DEFINES has the site's values: as many processes as cores, in all 640 threads, MAX_UPLOAD_BYTES as the setting.
ENV APP_PORT=8080 RUN_DIR=/run/keras-rest-api APACHE_DEFINES="WEB_PROCESSES=4 WEB_THREADS=160"
EXPOSE 8080
# Apache's signal for: take no more, answer what is here, then leave.
STOPSIGNAL SIGWINCH
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD [".venv/bin/python", "deploy/container_health.py", "web"]
CMD ["deploy/apache/run-private"]

FROM base AS model
ARG REQUIREMENTS=requirements/service.txt
COPY requirements requirements
RUN .venv/bin/pip install --no-cache-dir --no-input -r ${REQUIREMENTS} -c requirements/constraints.txt
RUN useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keras-rest-api \
    && install -d -o keras-rest-api -g keras-rest-api /var/cache/keras-rest-api
COPY . .
USER keras-rest-api
# Where Keras keeps the weights that it fetches: a volume.
ENV KERAS_HOME=/var/cache/keras-rest-api
VOLUME /var/cache/keras-rest-api
# Healthy when it serves: a large model takes minutes to load, longer where its weights are fetched.
HEALTHCHECK --interval=10s --timeout=10s --start-period=20m \
    CMD [".venv/bin/python", "deploy/container_health.py", "model"]
# run_model_server.py, with the model that deploy/default_model.py chooses where MODEL is not set.
CMD [".venv/bin/python", "deploy/default_model.py", "--gpu", "0"]
