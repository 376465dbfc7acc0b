//! Rules about the source text that no compiler checks.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file, in lines: one idea each.
const FILE_LINES_MAX: usize = 1000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").to_owned()
}

fn collect(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).expect("the source tree can be read") {
        let path = entry.expect("the source tree can be read").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect(&path, found);
            }
        } else if [".rs", ".md", ".toml"].iter().any(|e| name.ends_with(e)) {
            let text = fs::read_to_string(&path).expect("source files are UTF-8");
            let name = path.strip_prefix(root()).unwrap_or(&path).to_string_lossy().into_owned();
            found.push((name, text));
        }
    }
}

fn files() -> Vec<(String, String)> {
    let mut found = Vec::new();
    collect(&root(), &mut found);
    found.sort();
    assert!(found.len() > 30, "the source tree was not found");
    found
}

fn sources() -> impl Iterator<Item = (String, String)> {
    // This file names what it forbids.
    files().into_iter().filter(|(name, _)| name.ends_with(".rs") && !name.ends_with("tests/tidy.rs"))
}

fn check(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn files_are_of_a_size_that_can_be_read() {
    let long = sources().map(|(name, text)| (name, text.lines().count())).filter(|(_, n)| *n > FILE_LINES_MAX);
    check(long.map(|(name, n)| format!("{name}: {n} lines, more than {FILE_LINES_MAX}: split it")).collect());
}

#[test]
fn files_open_with_their_purpose() {
    let bare = sources()
        .filter(|(name, _)| !name.ends_with("/tests.rs"))
        .filter(|(_, text)| !text.trim_start_matches("#!").trim_start().starts_with("//!"));
    check(bare.map(|(name, _)| format!("{name}: does not open with //! (purpose, invariants, exclusions)")).collect());
}

#[test]
fn nothing_is_left_to_do() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (at, line) in text.lines().enumerate() {
            for word in ["TODO", "FIXME", "XXX", "HACK", "todo!(", "unimplemented!(", "dbg!("] {
                if line.contains(word) {
                    problems.push(format!("{name}:{}: {word}", at + 1));
                }
            }
        }
    }
    check(problems);
}

#[test]
fn nothing_tells_of_the_machine_it_was_written_on() {
    // Where this checkout is, and whose it is; who has no home (or the root directory) has no name to tell.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|path| path.display().to_string());
    let places: Vec<String> = [checkout, std::env::var("HOME").ok()]
        .into_iter()
        .flatten()
        .map(|place| format!("{}/", place.trim_end_matches('/')))
        .filter(|place| place.len() > 2)
        .collect();
    let mut problems = Vec::new();
    for (name, text) in files() {
        for (at, line) in text.lines().enumerate() {
            for word in &places {
                if line.contains(word.as_str()) {
                    problems.push(format!("{name}:{}: {word}", at + 1));
                }
            }
        }
    }
    check(problems);
}

/// An unbiased `select!` tosses a coin that the seed does not decide.
#[test]
fn select_is_biased_so_that_seeds_replay() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        // The command line and the daemon's outermost loop never run in the simulator.
        if name.starts_with("tools/") && !name.contains("node") {
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let next = lines[at + 1..].iter().find(|l| !l.trim().is_empty() && !l.trim().starts_with("//"));
            if line.contains("select! {") && !next.is_some_and(|l| l.trim().starts_with("biased;")) {
                problems.push(format!("{name}:{}: select! without biased;", at + 1));
            }
        }
    }
    check(problems);
}

/// tokio's `watch` wakes those who wait in an order of chance; `cluster::watch` does not.
#[test]
fn nothing_that_is_simulated_uses_the_watch_of_tokio() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        // Neither the daemon nor the kernel's side of the file system runs in the simulator.
        if name.starts_with("tools/") || name.starts_with("fs/src/shell/") {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            let used = line.split("tokio::sync::").nth(1).is_some_and(|rest| {
                rest.starts_with("watch") || rest.starts_with('{') && rest.split([',', '{', '}', ' ']).any(|w| w == "watch")
            });
            if used && !line.trim_start().starts_with("//") {
                problems.push(format!("{name}:{}: tokio::sync::watch; use cluster::watch", at + 1));
            }
        }
    }
    check(problems);
}

/// Only shells touch the operating system; the cores cannot even name it.
#[test]
fn cores_are_pure() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let layer = ["cluster/src/", "mirror/src/", "sld/src/", "fs/src/"].iter().find_map(|l| name.strip_prefix(l));
        let Some(inside) = layer else { continue };
        if inside.starts_with("shell") || inside.starts_with("sim") || inside.contains("tests") {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (at, line) in code.lines().enumerate() {
            for word in ["std::thread", "spawn_blocking", "std::net", "std::fs::", "std::process", "rand::", "unsafe {"] {
                if line.contains(word) && !line.trim_start().starts_with("//") {
                    problems.push(format!("{name}:{}: {word} outside a shell", at + 1));
                }
            }
        }
    }
    check(problems);
}

#[test]
fn documents_link_to_what_is_there() {
    let mut problems = Vec::new();
    for (name, text) in files().into_iter().filter(|(name, _)| name.ends_with(".md")) {
        let dir = root().join(&name).parent().expect("a file is in a directory").to_owned();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if !path.is_empty() && !path.contains("://") && !dir.join(path).exists() {
                problems.push(format!("{name}: link to {target}, which is not there"));
            }
        }
    }
    check(problems);
}

/// What holds a promise true is named by its function, and must be there. (Shorter words are options, fields or system calls.)
#[test]
fn checks_that_documents_name_exist() {
    let code: String = files().into_iter().filter(|(name, _)| name.ends_with(".rs")).map(|(_, text)| text).collect();
    let functions: std::collections::BTreeSet<&str> = code
        .split("fn ")
        .skip(1)
        .map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default())
        .collect();
    let (mut problems, mut seen) = (Vec::new(), 0);
    for (name, text) in files().into_iter().filter(|(name, _)| name.ends_with(".md")) {
        for word in text.split('`').skip(1).step_by(2) {
            let is_name = word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            if is_name && word.matches('_').count() >= 3 {
                seen += 1;
                if !functions.contains(word) {
                    problems.push(format!("{name}: {word} is not there"));
                }
            }
        }
    }
    assert!(seen > 40, "only {seen} names found");
    check(problems);
}
