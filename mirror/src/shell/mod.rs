//! Shells: they run the cores on tokio, over devices and the cluster's messaging. Only `device` touches the operating
//! system.

pub(crate) mod client;
pub(crate) mod device;
pub(crate) mod disk;
pub(crate) mod open;
pub(crate) mod rpc;
pub(crate) mod server;
pub(crate) mod tasks;
