//! What stands in for the kernel: packets in a `Vec`, tables in `HashMap`s, and packets built independently of our
//! code. The tests of `lb-common` run the data path on it; the program tests compare the loaded programs with it.

pub mod build;
pub mod cluster;
pub mod frame;
pub mod hostile;
pub mod paths;
pub mod world;
