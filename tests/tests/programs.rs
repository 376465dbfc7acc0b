//! Real programs on real clusters: each script of `tests/programs` is given the mounts of three nodes, and says by its exit
//! code whether all went well. What a script needs is named in it; where that is not installed, the test says so and passes.
//! They need root and /dev/fuse, and are run by `ci`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock, run};

const LONG: Duration = Duration::from_secs(300);

/// Where programs are looked for, beside `$PATH`: Debian keeps PostgreSQL's elsewhere.
fn places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    for version in std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        places.push(version.path().join("bin"));
    }
    places
}

#[track_caller]
fn script(name: &str, env: &[(&str, &str)]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name);
    let text = std::fs::read_to_string(&path).expect("the script is there");
    let needs = text.lines().find_map(|l| l.strip_prefix("# needs: ")).expect("a script names what it needs");
    let lacking: Vec<&str> =
        needs.split_whitespace().filter(|program| !places().iter().any(|p| p.join(program).exists())).collect();
    if !lacking.is_empty() {
        println!("{name}: not run, {} is not installed", lacking.join(", "));
        return;
    }
    let cluster = RealCluster::up(&Options::default());
    let begun = clock();
    let mut command = Command::new(&path);
    command.args(cluster.mounts()).envs(env.iter().copied());
    let output = run(command, LONG).unwrap_or_else(|e| panic!("{e}\n{}", cluster.logs()));
    println!("{name}: {:?}\n{}", clock().saturating_sub(begun), output.text);
    assert_eq!(output.code, 0, "{}{}\n{}", output.text, output.errors, cluster.logs());
    cluster.fsck(1);
}

macro_rules! scripts {
    ($($test:ident: $name:literal $(, $key:literal = $value:literal)*;)*) => {
        $(
            #[test]
            #[ignore = "needs root and /dev/fuse: run by ci"]
            fn $test() {
                script($name, &[$(($key, $value)),*]);
            }
        )*
    };
}

scripts! {
    git_from_three_nodes: "git.sh", "ROUNDS" = "4";
    cargo_from_three_nodes_into_one_target: "cargo.sh";
    sqlite_from_three_nodes: "sqlite.sh";
    postgres_moves_from_node_to_node: "postgres.sh", "SECONDS_OF_LOAD" = "3";
    rsync_transfers_nothing_twice: "rsync.sh";
    tar_cp_find_and_du_say_the_same: "listing.sh";
    maildir_from_three_nodes: "maildir.sh", "MESSAGES" = "60";
    stressors_verify: "stress.sh", "SECONDS_EACH" = "1";
}
