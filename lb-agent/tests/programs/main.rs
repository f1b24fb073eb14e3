//! The compiled programs, loaded into this kernel and given whole packets by `BPF_PROG_TEST_RUN`: they have to do what
//! the same logic does on the host (`lb-common/tests/datapath`), and what packets built by `etherparse` say. Needs
//! root. Every test has its own instance with its own maps, and a network namespace without any sockets.

#[path = "../../../lb-common/tests/support/mod.rs"]
#[expect(dead_code, reason = "the host's tests use the rest")]
mod support;

mod devices;
mod differential;
mod loaded;
mod paths;
mod transit;
