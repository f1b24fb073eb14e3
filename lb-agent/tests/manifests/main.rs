//! Directories of manifests: what is read, what is complained about, what a change of a file does.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "shared with tests that use more of it")]
mod support;

mod parse;
mod watch;
