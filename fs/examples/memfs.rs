//! A file system in memory, mounted: `memfs MIB DIRECTORY…`. Ends when it is unmounted everywhere. Needs root and /dev/fuse.

use fs::shell::{MountOptions, ServeOptions, Server, Unmount, mount};
use fs::{FileSystem, FormatParams, Time};
use sld::memory::MemoryDisk;
use std::path::PathBuf;
use std::sync::Arc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let mib: u32 = arguments.next().and_then(|a| a.to_str()?.parse().ok()).ok_or("usage: memfs MIB DIRECTORY…")?;
    let disk = MemoryDisk::new(&[mib * 128, mib * 128]);
    let params = FormatParams {
        uuid: *b"in memory only..",
        hash_key: *b"not so random...",
        label: "memfs".to_owned(),
        uid: 0,
        gid: 0,
        mode: 0o755,
        now: now(),
    };
    FileSystem::format(&disk, &params).await?;
    let fs = Arc::new(FileSystem::mount(disk, Arc::new(now)).await?);
    let server = Server::new(fs);
    let mut handles = Vec::new();
    for directory in arguments.map(PathBuf::from) {
        let fuse = mount("memfs", &directory, &MountOptions::parse("rw")?)?;
        let options = ServeOptions { directory: Some(directory), ..ServeOptions::default() };
        let handle = server.serve(fuse, options)?;
        handle.ready().await?;
        handles.push(handle);
    }
    println!("ready");
    tokio::select! {
        biased;
        () = async { for handle in &handles { handle.ended().await; } } => {}
        _ = tokio::signal::ctrl_c() => for handle in &handles { handle.unmount(Unmount::Lazy)? },
    }
    for handle in handles {
        handle.join()?;
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the example's clock is the wall clock")]
fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() }
}
