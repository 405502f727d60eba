# The image: one static binary, the certificates it trusts, an empty /data.
#
#   docker build --build-arg VERSION="$(git describe --always --dirty)" -t llm-proxy .
#   docker run --read-only --cap-drop=ALL --security-opt=no-new-privileges -p 127.0.0.1:8080:8080 -v llm-proxy-data:/data llm-proxy
#
# With PostgreSQL: docker build --target postgres -t llm-proxy:postgres .
#
# Two builds of one commit with one GO_IMAGE give the same binary, byte for byte.
# To pin the compiler by digest: --build-arg GO_IMAGE=golang@sha256:...
ARG GO_IMAGE=golang:1.26.8
FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS source
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download && mkdir -p /out/root && mkdir -m 0700 /out/root/data && cp /etc/ssl/certs/ca-certificates.crt /out/
COPY . .

FROM source AS build
ARG VERSION=devel TARGETOS TARGETARCH
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOFLAGS=-mod=readonly \
    go build -trimpath -buildvcs=false -ldflags="-s -w -buildid= -X main.linkedVersion=$VERSION" -o /out/llm-proxy .

FROM source AS build-postgres
ARG VERSION=devel TARGETOS TARGETARCH
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOFLAGS=-mod=readonly \
    go build -tags postgres -trimpath -buildvcs=false -ldflags="-s -w -buildid= -X main.linkedVersion=$VERSION" -o /out/llm-proxy .

FROM scratch AS base
COPY --from=source /out/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=source --chown=65532:65532 /out/root/ /
# TMPDIR: the image has no /tmp, and SQLite sorts large results on disk.
ENV LISTEN_ADDR=:8080 DATA_DIR=/data TMPDIR=/data
USER 65532:65532
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["/llm-proxy", "healthcheck"]
ENTRYPOINT ["/llm-proxy"]

FROM base AS postgres
COPY --from=build-postgres /out/llm-proxy /llm-proxy

FROM base
COPY --from=build /out/llm-proxy /llm-proxy
