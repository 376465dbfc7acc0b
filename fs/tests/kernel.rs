//! The file system over a disk in memory, as the kernel and programs see it. Needs root and /dev/fuse; passes without them.

use fs::shell::{MountHandle, MountOptions, ServeOptions, Server, mount};
use fs::{FileSystem, FormatParams, Time};
use sld::memory::MemoryDisk;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::runtime::Runtime;

struct Mounted {
    handles: Vec<MountHandle>,
    directory: tempfile::TempDir,
    runtime: Runtime,
}

impl Mounted {
    /// `count` mounts of one file system; `None` where nothing can be mounted.
    fn new(count: usize) -> Option<Mounted> {
        let possible = nix::unistd::geteuid().is_root() && OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
        if !possible {
            eprintln!("skipped: no right to mount");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let handles = runtime.block_on(async {
            let disk = MemoryDisk::new(&[50_000]);
            let params = FormatParams {
                uuid: [1; 16],
                hash_key: [2; 16],
                label: "test".to_owned(),
                uid: 0,
                gid: 0,
                mode: 0o755,
                now: Time { seconds: 1000, nanos: 0 },
            };
            FileSystem::format(&disk, &params).await.unwrap();
            let ticks = AtomicU64::new(2_000_000_000_000_000_000);
            let clock = Arc::new(move || Time::from_nanos(ticks.fetch_add(1000, Ordering::Relaxed)));
            let server = Server::new(Arc::new(FileSystem::mount(disk, clock).await.unwrap()));
            let mut handles = Vec::new();
            for number in 0..count {
                let path = directory.path().join(number.to_string());
                std::fs::create_dir(&path).unwrap();
                let fuse = mount("test", &path, &MountOptions::default()).unwrap();
                let handle = server.serve(fuse, ServeOptions { directory: Some(path), ..ServeOptions::default() }).unwrap();
                handle.ready().await.unwrap();
                handles.push(handle);
            }
            handles
        });
        Some(Mounted { handles, directory, runtime })
    }

    fn path(&self, number: usize) -> PathBuf {
        self.directory.path().join(number.to_string())
    }
}

fn is_mounted(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().any(|l| l.split(' ').nth(4) == path.to_str())
}

#[test]
fn programs_find_a_posix_file_system() {
    let Some(mounted) = Mounted::new(1) else { return };
    let root = mounted.path(0);
    assert_eq!(root.metadata().unwrap().ino(), 1);
    let file = root.join("file");
    std::fs::write(&file, b"hello").unwrap();
    OpenOptions::new().append(true).open(&file).unwrap().write_all(b" world").unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"hello world");
    let large: Vec<u8> = (0..3_000_000u32).map(|i| (i / 5) as u8).collect();
    std::fs::write(root.join("large"), &large).unwrap();
    assert!(std::fs::read(root.join("large")).unwrap() == large);
    std::fs::copy(root.join("large"), root.join("copy")).unwrap();
    assert!(std::fs::read(root.join("copy")).unwrap() == large);
    File::options().write(true).open(root.join("copy")).unwrap().set_len(10).unwrap();
    assert_eq!(std::fs::read(root.join("copy")).unwrap(), large[..10]);

    std::fs::create_dir_all(root.join("a/b/c")).unwrap();
    std::fs::rename(&file, root.join("a/b/c/file")).unwrap();
    assert!(!file.exists());
    std::fs::hard_link(root.join("a/b/c/file"), &file).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 2);
    symlink("a/b/c/file", root.join("link")).unwrap();
    assert_eq!(std::fs::read(root.join("link")).unwrap(), b"hello world");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(root.join("link").metadata().unwrap().mode(), 0o100_640);
    for number in 0..500 {
        File::create(root.join(format!("a/{number}"))).unwrap();
    }
    assert_eq!(root.join("a").read_dir().unwrap().count(), 501);
    assert!(root.join("a").read_dir().unwrap().all(|e| e.unwrap().metadata().is_ok()));
    assert!(std::fs::remove_dir(root.join("a")).is_err());
    std::fs::remove_dir_all(root.join("a")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 1);

    // Removed but open.
    let mut open = File::options().read(true).write(true).open(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    open.write_all(b"HELLO").unwrap();
    let mut rest = String::new();
    open.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, " world");
    open.sync_all().unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
}

#[test]
fn two_mounts_show_the_same_at_once() {
    let Some(mounted) = Mounted::new(2) else { return };
    let paths = [mounted.path(0).join("file"), mounted.path(1).join("file")];
    std::fs::write(&paths[0], vec![0; 5000]).unwrap();
    let readers = paths.each_ref().map(|p| File::open(p).unwrap());
    let writers = paths.each_ref().map(|p| File::options().write(true).open(p).unwrap());
    let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    let mut buffer = vec![0; 5000];
    for round in 1..200u32 {
        let writer = &writers[round as usize % 2];
        writer.write_all_at(&vec![round as u8; 5000], 0).unwrap();
        if round % 3 == 0 {
            // Neither time nor size tells that the data is new.
            writer.set_times(times).unwrap();
        }
        for (reader, path) in readers.iter().zip(&paths) {
            reader.read_exact_at(&mut buffer, 0).unwrap();
            assert!(buffer.iter().all(|b| *b == round as u8), "round {round}");
            assert_eq!(path.metadata().unwrap().len(), 5000);
        }
    }
    std::fs::rename(&paths[0], paths[0].with_extension("new")).unwrap();
    assert!(!paths[1].exists() && paths[1].with_extension("new").exists());
}

#[test]
fn dropping_the_handle_takes_the_mount_away() {
    let Some(mut mounted) = Mounted::new(1) else { return };
    let path = mounted.path(0);
    std::fs::write(path.join("file"), b"x").unwrap();
    let open = File::open(path.join("file")).unwrap();
    assert!(is_mounted(&path));
    mounted.handles.clear();
    assert!(!is_mounted(&path));
    assert!(open.read_at(&mut [0; 1], 0).is_err(), "who still has a file open is cut off");
    drop(mounted.runtime);
}
