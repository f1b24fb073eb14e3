# The image, from a clean clone:
#
#     docker build -t lb-agent .      podman build -t lb-agent .      buildah bud -t lb-agent .
#     docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/lb-agent --push .
#
# `cargo xtask image` puts what this machine has built into the last stage instead, which takes no download.

# On the machine that builds, whatever the image is for: a compiler is faster than an emulated one.
FROM --platform=${BUILDPLATFORM:-linux/amd64} docker.io/library/rust:1.95-bookworm AS build
ARG TARGETARCH
# Not the toolchain that rust-toolchain.toml would download.
ENV RUSTUP_TOOLCHAIN=1.95.0 CARGO_TERM_COLOR=never
WORKDIR /src
COPY . .
RUN set -eu; \
    case "${TARGETARCH:-$(dpkg --print-architecture)}" in \
        amd64) machine=x86_64 package=x86-64-linux-gnu libc=libc6-dev-amd64-cross ;; \
        arm64) machine=aarch64 package=aarch64-linux-gnu libc=libc6-dev-arm64-cross ;; \
        *) echo "there is no build for $TARGETARCH" >&2; exit 1 ;; \
    esac; \
    gcc=$machine-linux-gnu-gcc target=$machine-unknown-linux-gnu; \
    if ! command -v "$gcc" >/dev/null; then \
        apt-get update -q; \
        apt-get install -q -y --no-install-recommends "gcc-$package" "$libc"; \
    fi; \
    rustup target add "$target"; \
    name=$(echo "$target" | tr a-z- A-Z_); \
    export "CC_$(echo "$target" | tr - _)=$gcc" "CARGO_TARGET_${name}_LINKER=$gcc" \
        "CARGO_TARGET_${name}_RUSTFLAGS=-C target-feature=+crt-static"; \
    cargo build --release --locked --target "$target" --package lb-agent --package lb-cni --bins; \
    mkdir -p /out/bin; \
    for program in lb-agent lb-cni lbctl; do cp "target/$target/release/$program" /out/bin; done

FROM scratch
LABEL org.opencontainers.image.title="lb-agent" \
      org.opencontainers.image.description="An eBPF Service load balancer for Kubernetes: the agent, its CNI plugin, its inspector" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY --from=build /out/bin/ /bin/
# For `kubectl exec … -- lbctl status`.
ENV PATH=/bin
ENTRYPOINT ["/bin/lb-agent"]
CMD ["run"]
