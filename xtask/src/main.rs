//! The builder tool.
fn main() {}
