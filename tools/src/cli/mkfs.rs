//! `mkfs.pulsarfs NAME`.

use super::Place;
use super::cluster::unexpected;
use crate::control::{Answer, Request};
use crate::failure::{EXIT_USAGE, Failure, Outcome};
use crate::size::Size;
use clap::Args;
use std::time::Duration;

/// `mkfs.pulsarfs`.
#[derive(Clone, Debug, Args)]
pub struct MkfsArgs {
    /// Name of the new file system, as in 'mount -t pulsarfs NAME DIR'
    pub name: String,
    /// Copies of every block, each on a disk of another node
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub copies: u8,
    /// Usable size [default: all free space]
    #[arg(long)]
    pub size: Option<Size>,
}

pub(super) fn run(place: &Place, args: &MkfsArgs) -> Outcome<u8> {
    if args.name.is_empty() || args.name.len() > 64 || args.name.contains(['/', ',', ' ', '\n', '\\']) {
        return Err(Failure::new("a file system's name has 1 to 64 characters, no blank, comma or slash").code(EXIT_USAGE));
    }
    let request = Request::Mkfs { name: args.name.clone(), copies: args.copies, size_bytes: args.size.map(|s| s.0) };
    match place.client()?.call_with(request, None, Duration::from_secs(60), |_| {})? {
        Answer::Done { text } => say!("{text}"),
        other => return Err(unexpected(&other)),
    }
    Ok(0)
}
