//! `gc`, `scrub`, `fsck` (in use), `sync`: work that the daemon does.

use super::cluster::unexpected;
use super::{Place, Verb, json};
use crate::control::{Answer, Request, TaskReport};
use crate::failure::{Failure, Outcome};
use clap::Args;
use std::io::IsTerminal;
use std::time::Duration;

/// The longest silence during a long task.
const SILENCE: Duration = Duration::from_secs(120);

/// `pulsar gc`.
#[derive(Clone, Debug, Args)]
pub(super) struct GcArgs {
    /// What to do
    verb: Verb,
    /// Name of the file system [default: the only one]
    #[arg(default_value = "")]
    fs: String,
    /// Only tell what would be freed
    #[arg(long)]
    dry_run: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// `pulsar scrub`.
#[derive(Clone, Debug, Args)]
pub(super) struct ScrubArgs {
    /// What to do
    verb: Verb,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// `pulsar fsck`.
#[derive(Clone, Debug, Args)]
pub(super) struct OnlineFsckArgs {
    /// Name of the file system
    fs: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Shows how far a task is: one line that changes on a terminal, none off it.
fn watch(place: &Place, request: Request) -> Outcome<Answer> {
    let bar = if std::io::stderr().is_terminal() { Some(indicatif::ProgressBar::new(0)) } else { None };
    let answer = place.client()?.call_with(request, None, SILENCE, |answer| {
        if let (Some(bar), Answer::Progress { text, done, total }) = (&bar, answer) {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(text);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    answer
}

fn report(answer: &Answer, as_json: bool) -> Outcome<TaskReport> {
    let report = match answer {
        Answer::Task(report) => report.clone(),
        other => return Err(unexpected(other)),
    };
    if as_json {
        json(&report)?;
        return Ok(report);
    }
    for line in &report.lines {
        say!("{line}");
    }
    let progress = match report.total {
        0 => String::new(),
        total => format!(", {} of {total}", report.done),
    };
    say!("{}: {}{progress}, {} found, {} put right", report.task, report.state, report.found, report.repaired);
    Ok(report)
}

pub(super) fn gc(place: &Place, args: &GcArgs) -> Outcome<u8> {
    let request = Request::Gc { fs: args.fs.clone(), action: args.verb.into(), dry_run: args.dry_run };
    report(&watch(place, request)?, args.json)?;
    Ok(0)
}

pub(super) fn scrub(place: &Place, args: &ScrubArgs) -> Outcome<u8> {
    report(&watch(place, Request::Scrub { action: args.verb.into() })?, args.json)?;
    Ok(0)
}

pub(super) fn fsck(place: &Place, args: &OnlineFsckArgs) -> Outcome<u8> {
    let answer = watch(place, Request::Fsck { fs: args.fs.clone() }).map_err(|e| Failure::code(e, 8))?;
    let report = report(&answer, args.json)?;
    Ok(if report.found == 0 { 0 } else { 4 })
}

pub(super) fn sync(place: &Place) -> Outcome<u8> {
    place.client()?.call(Request::Sync, SILENCE)?;
    Ok(0)
}
