//! Real programs on real clusters: each script of `tests/programs` is given the mounts of three nodes, and says by its exit
//! code whether all went well. What a script needs is named in it; where that is not installed, the test says so and passes;
//! if PULSAR_TEST_ALL is set, it fails.
//! They need root and /dev/fuse, and are run by `ci`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock, run};
use tests::sys::is_installed;

const LONG: Duration = Duration::from_secs(300);

#[track_caller]
fn script(name: &str, env: &[(&str, &str)]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name);
    let text = std::fs::read_to_string(&path).expect("the script is there");
    let needs = text.lines().find_map(|l| l.strip_prefix("# needs: ")).expect("a script names what it needs");
    let lacking: Vec<&str> = needs.split_whitespace().filter(|program| !is_installed(program)).collect();
    if !lacking.is_empty() {
        // `ci` says so, too, before and after all.
        let what = format!("{name}: not run, {} is not installed", lacking.join(", "));
        assert!(std::env::var_os("PULSAR_TEST_ALL").is_none(), "{what}");
        println!("{what}");
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
    pjdfstest_passes: "pjdfstest.sh";
    fsx_finds_nothing: "fsx.sh", "OPS" = "20000";
}
