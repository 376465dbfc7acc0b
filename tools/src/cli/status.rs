//! `pulsar status` and the lists: the report, put into words. It always answers within two seconds, also when the daemon
//! is down or this node is cut off.

use super::cluster::unexpected;
use super::{Place, json, table};
use crate::control::client::{NoAnswer, QUICK};
use crate::control::{Answer as Reply, Request};
use crate::failure::{Failure, Outcome};
use crate::size::{duration, human};
use crate::status::{Answer, Level, MirrorStatus, Problem, Resync, SCHEMA_VERSION, Status};
use clap::Args;
use serde::Serialize;
use std::io::IsTerminal;

/// `pulsar status`.
#[derive(Clone, Debug, Args)]
pub(super) struct StatusArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Only what is not as it should be; exit code 0 if all is well, 1 for warnings, 2 if data cannot be reached or written
    #[arg(short = 'x')]
    problems_only: bool,
}

/// What is said when the daemon gives no answer.
#[derive(Serialize)]
struct NoStatus {
    schema_version: u32,
    current: bool,
    data_safe: Answer,
    can_lose_node: Answer,
    writes_accepted: Answer,
    problems: Vec<Problem>,
}

impl NoStatus {
    fn new(why: &NoAnswer) -> Self {
        let (code, action) = match why {
            NoAnswer::NotRunning(..) => ("daemon_down", "start it, or ask on another node"),
            NoAnswer::NotAllowed(_) => ("not_allowed", "ask as root"),
            NoAnswer::TimedOut(_) | NoAnswer::Broken(_) => ("daemon_silent", "see its log, or ask on another node"),
        };
        let unknown = |text: &str| Answer { level: Level::Unknown, text: text.into() };
        NoStatus {
            schema_version: SCHEMA_VERSION,
            current: false,
            data_safe: unknown("not known here: the daemon of this node gives no answer; the other nodes know"),
            can_lose_node: unknown("not known here"),
            writes_accepted: Answer { level: Level::Bad, text: "not on this node".into() },
            problems: vec![Problem { code: code.into(), level: Level::Bad, what: why.to_string(), action: action.into() }],
        }
    }
}

fn fetch(place: &Place) -> Outcome<Result<Status, NoAnswer>> {
    match place.client()?.try_call(Request::Status, QUICK) {
        Ok(Reply::Status(status)) => Ok(Ok(*status)),
        Ok(Reply::Error { message }) => Err(Failure::new(message)),
        Ok(other) => Err(unexpected(&other)),
        Err(e) => Ok(Err(e)),
    }
}

pub(super) fn run(place: &Place, args: &StatusArgs) -> Outcome<u8> {
    let (text, level) = match fetch(place)? {
        Ok(status) => {
            if args.json {
                json(&status)?;
            }
            (render(&status, args.problems_only), status.worst())
        }
        Err(why) => {
            let none = NoStatus::new(&why);
            if args.json {
                json(&none)?;
            }
            let mut lines = answers(&none.data_safe, &none.can_lose_node, &none.writes_accepted);
            lines.extend(problem_lines(&none.problems));
            (lines.join("\n"), Level::Bad)
        }
    };
    if !args.json {
        say!("{text}");
    }
    Ok(match (args.problems_only, level) {
        (true, Level::Ok) => 0,
        (true, Level::Warning) => 1,
        (true, _) => 2,
        (false, _) => 0,
    })
}

fn colour(level: Level, text: &str) -> String {
    let code = match level {
        Level::Ok => "32",
        Level::Warning => "33",
        Level::Bad | Level::Unknown => "31",
    };
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_string()
    }
}

fn answers(safe: &Answer, lose: &Answer, writes: &Answer) -> Vec<String> {
    [("is the data safe?        ", safe), ("can a node be lost now?  ", lose), ("are writes accepted?     ", writes)]
        .iter()
        .map(|(question, answer)| format!("{question}{}", colour(answer.level, &answer.text)))
        .collect()
}

fn problem_lines(problems: &[Problem]) -> Vec<String> {
    let mut lines = Vec::new();
    for problem in problems {
        lines.push(format!("\n{}  [{}]", colour(problem.level, &problem.what), problem.code));
        lines.push(format!("  to do: {}", problem.action));
    }
    lines
}

/// The report in words.
#[must_use]
pub(super) fn render(status: &Status, problems_only: bool) -> String {
    if problems_only && status.worst() == Level::Ok {
        return "all is well".into();
    }
    let mut lines = answers(&status.data_safe, &status.can_lose_node, &status.writes_accepted);
    lines.extend(problem_lines(&status.problems));
    if problems_only {
        return lines.join("\n");
    }
    let leader = status.leader.as_ref().map_or_else(|| "leader not known".into(), |l| format!("led by {l}"));
    let recovered =
        if status.recovered == "fs" { "all layers recovered".into() } else { format!("recovered up to: {}", status.recovered) };
    lines.push(format!(
        "\ncluster {}, epoch {}, {leader}, {recovered}; asked on {}, up for {}",
        status.cluster,
        status.epoch,
        status.node,
        duration(status.uptime_s)
    ));
    lines.push("\nnodes".into());
    for n in &status.nodes {
        let state = if n.up { colour(Level::Ok, "up") } else { colour(Level::Bad, "down") };
        let role = match (n.leader, n.voter) {
            (true, _) => ", leader",
            (false, true) => ", voter",
            (false, false) => "",
        };
        lines.push(format!("  {:<12} {:<22} {state}{role}", n.name, n.addr));
    }
    if !status.disks.is_empty() {
        lines.push("\ndisks".into());
    }
    for d in &status.disks {
        let level = if d.state == "ok" { Level::Ok } else { Level::Bad };
        lines.push(format!(
            "  d{:<11} {:<22} {}, {} of {} given to file systems",
            d.id,
            d.node,
            colour(level, &d.state),
            human(d.used_bytes),
            human(d.size_bytes)
        ));
    }
    if !status.filesystems.is_empty() {
        lines.push("\nfile systems".into());
    }
    for f in &status.filesystems {
        let used = f.used_bytes.map_or_else(String::new, |u| format!("{} used of ", human(u)));
        let state = if f.formatted { "" } else { ", not formatted" };
        lines.push(format!("  {:<12} {} copies, {used}{}{state}", f.name, f.copies, human(f.size_bytes)));
        let mirrors: Vec<_> = status.mirrors.iter().filter(|m| m.fs == f.name).collect();
        let well = |m: &&&MirrorStatus| m.copies.iter().all(|c| c.state == "in_sync" && c.reachable);
        let good = mirrors.iter().filter(well).count();
        lines.push(format!(
            "    {good} of {} mirrors have all copies in sync{}",
            mirrors.len(),
            if good == mirrors.len() { "" } else { "; the others:" }
        ));
        // Those that are well are many and say nothing; `--json` has them.
        for m in mirrors.iter().filter(|m| !well(m)) {
            let copies: Vec<String> = m
                .copies
                .iter()
                .map(|c| {
                    let (level, state) = match (c.state.as_str(), c.reachable) {
                        ("in_sync", true) => (Level::Ok, "in sync"),
                        ("in_sync", false) => (Level::Bad, "in sync, not reachable"),
                        ("syncing", true) => (Level::Warning, "syncing"),
                        (_, true) => (Level::Warning, "out of date"),
                        (_, false) => (Level::Warning, "out of date, not reachable"),
                    };
                    format!("{} d{} {}", c.node, c.disk, colour(level, state))
                })
                .collect();
            lines.push(format!("    m{:<9} {:<9} {}", m.id, human(m.size_bytes), copies.join("; ")));
        }
    }
    if !status.resync.is_empty() {
        lines.push("\nresync".into());
    }
    lines.extend(status.resync.iter().map(resync_line));
    lines.push(format!(
        "\nspace: {} raw, {} of it not given to a file system; this node: {} not yet on disk, {} cached",
        human(status.raw_bytes),
        human(status.raw_free_bytes),
        human(status.dirty_bytes),
        human(status.cached_bytes)
    ));
    for m in &status.mounts {
        lines.push(format!("mounted here: {} on {}", m.fs, m.dir));
    }
    lines.join("\n")
}

fn resync_line(r: &Resync) -> String {
    let rate = if r.rate_bytes_s > 0 { format!(", {}/s", human(r.rate_bytes_s)) } else { String::new() };
    let eta = match r.eta_s {
        Some((low, high)) if duration(low) == duration(high) => format!(", about {} more", duration(high)),
        Some((low, high)) => format!(", {} to {} more", duration(low), duration(high)),
        None => String::new(),
    };
    format!("  m{} on d{}: {} left, {} done{rate}{eta}", r.mirror, r.disk, human(r.left_bytes), human(r.done_bytes))
}

fn fetched(place: &Place) -> Outcome<Status> {
    fetch(place)?.map_err(Failure::from)
}

#[derive(Serialize)]
struct Listed<'a, T> {
    schema_version: u32,
    current: bool,
    items: &'a [T],
}

fn listed<T: Serialize>(
    status: &Status,
    items: &[T],
    as_json: bool,
    heads: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Outcome<u8> {
    if as_json {
        json(&Listed { schema_version: SCHEMA_VERSION, current: status.current, items })?;
        return Ok(0);
    }
    if !status.current {
        eprintln!("this node is cut off from the majority; this is what it knew in epoch {}", status.epoch);
    }
    let mut rows = vec![heads.iter().map(|h| (*h).to_string()).collect()];
    rows.extend(items.iter().map(row));
    table(&rows);
    Ok(0)
}

pub(super) fn nodes(place: &Place, as_json: bool) -> Outcome<u8> {
    let status = fetched(place)?;
    listed(&status, &status.nodes, as_json, &["NAME", "ADDRESS", "STATE", "ROLE"], |n| {
        let role = if n.leader {
            "leader"
        } else if n.voter {
            "voter"
        } else {
            "-"
        };
        vec![n.name.clone(), n.addr.clone(), if n.up { "up" } else { "down" }.into(), role.into()]
    })
}

pub(super) fn disks(place: &Place, as_json: bool) -> Outcome<u8> {
    let status = fetched(place)?;
    listed(&status, &status.disks, as_json, &["DISK", "NODE", "STATE", "SIZE", "USED", "UUID"], |d| {
        vec![format!("d{}", d.id), d.node.clone(), d.state.clone(), human(d.size_bytes), human(d.used_bytes), d.uuid.clone()]
    })
}

pub(super) fn filesystems(place: &Place, as_json: bool) -> Outcome<u8> {
    let status = fetched(place)?;
    listed(&status, &status.filesystems, as_json, &["NAME", "COPIES", "SIZE", "USED", "STATE"], |f| {
        vec![
            f.name.clone(),
            f.copies.to_string(),
            human(f.size_bytes),
            f.used_bytes.map_or_else(|| "-".into(), human),
            if f.formatted { "ready" } else { "not formatted" }.into(),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::{three, view};
    use crate::status::{Facts, assess};

    #[test]
    fn the_three_answers_come_first() {
        let status = assess(&view(three()), &Facts { lease_valid: true, ..Facts::default() });
        let text = render(&status, false);
        let first: Vec<&str> = text.lines().take(3).collect();
        assert_eq!(
            first,
            [
                "is the data safe?        yes, every block is on 2 disks of different nodes",
                "can a node be lost now?  yes, any one",
                "are writes accepted?     yes"
            ]
        );
        assert_eq!(render(&status, true), "all is well");
    }

    #[test]
    fn resync_shows_a_range() {
        let r = Resync {
            mirror: 2,
            disk: 3,
            left_bytes: 1 << 30,
            done_bytes: 1 << 20,
            rate_bytes_s: 10 << 20,
            eta_s: Some((90, 300)),
        };
        assert_eq!(resync_line(&r), "  m2 on d3: 1.0 GiB left, 1.0 MiB done, 10.0 MiB/s, 90 s to 5 min more");
    }
}
