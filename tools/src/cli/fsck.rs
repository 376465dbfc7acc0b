//! `fsck.pulsarfs`: checks the disks of a stopped cluster. Any one in-sync copy of each mirror is enough.
//!
//! It never writes, whatever the options: what can be repaired is repaired by the running cluster, which has all copies and
//! changes them under tokens. `-p` and `-y` are taken (boot scripts give them) and say so.
//!
//! Exit codes, or-ed, are those of fsck(8): 0 clean, 4 left uncorrected, 8 could not work, 16 usage, 32 cancelled; 1
//! (corrected) and 2 (restart the system) never come.

use super::Place;
use crate::failure::{Failure, Outcome};
use crate::settings::Settings;
use clap::Args;
use std::path::PathBuf;

/// Exit codes, as fsck(8) defines them.
pub mod exit {
    /// Nothing is damaged.
    pub const CLEAN: u8 = 0;
    /// Damage was left as it is.
    pub const UNCORRECTED: u8 = 4;
    /// The check could not be done.
    pub const OPERATIONAL: u8 = 8;
    /// Wrong use.
    pub const USAGE: u8 = 16;
    /// A signal ended it.
    pub const CANCELLED: u8 = 32;
}

/// `fsck.pulsarfs`.
#[derive(Clone, Debug, Args)]
pub struct FsckArgs {
    /// Disks (devices or files) of the cluster [default: those in the configuration file]. What is not a device or file
    /// is taken for the name of a file system
    pub disks: Vec<PathBuf>,
    /// Check this file system [default: all]
    #[arg(long, value_name = "NAME")]
    pub fs: Option<String>,
    /// Change nothing
    #[arg(short = 'n')]
    pub no: bool,
    /// As -n, for scripts: repairs are made by the running cluster, and what to run there is said
    #[arg(short = 'y', conflicts_with = "no")]
    pub yes: bool,
    /// As -n, for boot scripts: what a crash leaves behind harms nobody and is no error
    #[arg(short = 'p', short_alias = 'a', conflicts_with_all = ["no", "yes"])]
    pub preen: bool,
    /// Check even if it looks clean (it always does)
    #[arg(short = 'f')]
    pub force: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(place: &Place, args: &FsckArgs) -> Outcome<u8> {
    let mut disks = args.disks.clone();
    if disks.is_empty() {
        let settings = Settings::load(&place.config_file()).map_err(|e| e.code(exit::OPERATIONAL))?;
        disks = settings.disks.into_iter().map(|d| d.path).collect();
    }
    if disks.is_empty() {
        return Err(Failure::new("no disk is named, nor in the configuration file").code(exit::USAGE));
    }
    crate::daemon::offline::check(&disks, args)
}
