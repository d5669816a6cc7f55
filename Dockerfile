# Image of every role: `docker run everruns server`, `worker`, `migrate`, `config`, `check-log`. The embedded servers of
# `everruns dev` are not in it: it runs with a PostgreSQL and a Temporal of yours.

FROM python:3.13.16-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build

# Packages change less often than code: they have a layer of their own. Hashes, and no code run to install them.
COPY requirements-server.lock requirements-build.lock ./
RUN python -m venv /opt/everruns \
    && /opt/everruns/bin/pip install --require-hashes --only-binary :all: -r requirements-server.lock \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements-build.lock

COPY . .
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/everruns/bin/pip install --no-deps /wheels/*.whl


FROM python:3.13.16-slim-trixie
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin everruns
COPY --from=build /opt/everruns /opt/everruns
ENV PATH=/opt/everruns/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 9000

# For `server`; the other roles serve no port and switch it off.
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=5 CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('HTTP_ADDR') or ':9000').rpartition(':')[2] + '/health', timeout=2)"]

# In exec form, so that it is Python that gets SIGTERM.
ENTRYPOINT ["everruns"]
CMD ["server"]
