//! What stands in for the kernel: packets in a `Vec`, tables in `HashMap`s, and packets built independently of our
//! code. The tests of `lb-common` run the data path on it; the program tests compare the loaded programs with it.

pub(crate) mod build;
pub(crate) mod cluster;
pub(crate) mod driver;
pub(crate) mod frame;
pub(crate) mod hostile;
pub(crate) mod paths;
pub(crate) mod redirect;
pub(crate) mod world;
pub(crate) mod xdp_node;
