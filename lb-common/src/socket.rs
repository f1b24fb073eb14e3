//! The logic of the cgroup socket hooks.
