//! The shell: what touches the operating system. A mount is served here; what its requests mean is in `ops`.

mod apart;
mod front;
mod fuse;
mod handles;
mod known;
mod locks;
mod mount;
mod names;
mod notify;
mod probe;
mod renames;
mod rights;
mod serve;
mod signal;
mod syscall;
mod translate;
mod unheard;

pub use front::Lifetime;
pub use mount::{
    MOUNT_TYPE, MountOptions, TRANSFER_MAX, UnknownOption, Unmount, mount, receive_descriptor, remount, send_descriptor, unmount,
};
pub use serve::{MountHandle, OnLoss, ServeOptions, Server, serve};
