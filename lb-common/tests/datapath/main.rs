//! The data path on the host: whole packets through the hooks of every path, compared with packets that `etherparse`
//! built. The same logic runs in the kernel; `lb-agent/tests/programs` compares the two.

#[path = "../support/mod.rs"]
mod support;

mod again;
mod bridged;
mod choice;
mod collide;
mod errors;
mod fragments;
mod handover;
mod hostile;
mod loss;
mod masqueraded;
mod paths;
mod policy;
mod redirect;
mod refuse;
mod send;
mod transit;
