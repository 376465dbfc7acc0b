//! Who may change an inode: asked again when it is about to be changed.
//!
//! The kernel checks permissions before it asks us to do anything, but with the owner and mode that it was told when it last
//! asked. Another node may have given the file to somebody else since, and a descriptor that is held makes nobody ask anew. So
//! what only an owner may do is checked here once more, against the inode itself.
//!
//! Excludes: reading, writing and looking up, which a descriptor or a path entitles to.

use super::signal::{has_capability, is_in_group};
use crate::{Attributes, Caller, FileKind, FsError, Result, SetAttributes};
use nix::libc::{S_ISGID, S_ISUID};

/// Capabilities by their numbers.
const CHOWN: u32 = 0;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SYS_ADMIN: u32 = 21;

fn has(caller: &Caller, capability: u32) -> bool {
    caller.uid == 0 || has_capability(caller, capability)
}

fn is_owner(caller: &Caller, found: &Attributes) -> bool {
    caller.uid == found.uid || has(caller, FOWNER)
}

/// Whether the caller may give a file of this group the right to act as the group, and leave it that.
pub(super) fn acts_as_group(caller: &Caller, gid: u32) -> bool {
    is_in_group(caller, gid) || has(caller, FSETID)
}

/// Whether the caller is shown `trusted.` attributes.
pub(super) fn sees_trusted(caller: &Caller) -> bool {
    has(caller, SYS_ADMIN)
}

/// Whether what the caller changes the data of loses the right to act as owner and group.
pub(super) fn loses_set_ids(caller: &Caller) -> bool {
    !has(caller, FSETID)
}

/// What of a change of attributes may be done. `exact_times`: it sets times to other values than now.
///
/// # Errors
/// `NotPermitted`.
pub(super) fn change(caller: &Caller, exact_times: bool, found: &Attributes, set: SetAttributes) -> Result<SetAttributes> {
    let mut set = set;
    // A change of the owner to what it is already costs the file its set-ids, and so is no stranger's to make.
    if set == SetAttributes::default()
        && found.kind != FileKind::Directory
        && found.mode & (S_ISUID | S_ISGID) != 0
        && !is_owner(caller, found)
    {
        return Err(FsError::NotPermitted);
    }
    let gives_away = set.uid.is_some_and(|uid| caller.uid != found.uid || uid != found.uid);
    let regroups = set.gid.is_some_and(|gid| caller.uid != found.uid || gid != found.gid && !is_in_group(caller, gid));
    if (gives_away || regroups) && !has(caller, CHOWN) {
        return Err(FsError::NotPermitted);
    }
    if exact_times && !is_owner(caller, found) {
        return Err(FsError::NotPermitted);
    }
    if let Some(mode) = set.mode {
        let lost = found.mode & 0o7777 & !(mode & 0o7777);
        let only_loses_set_ids = found.mode & 0o7777 & !lost == mode & 0o7777 && lost & !(S_ISUID | S_ISGID) == 0;
        // The kernel itself takes set-ids away from what somebody writes to, who need not be the owner.
        if !only_loses_set_ids && !is_owner(caller, found) {
            return Err(FsError::NotPermitted);
        }
        if mode & S_ISGID != 0 && found.mode & S_ISGID == 0 && !acts_as_group(caller, set.gid.unwrap_or(found.gid)) {
            set.mode = Some(mode & !S_ISGID);
        }
    }
    Ok(set)
}

/// Whether access control lists may be changed, and whether that costs set-group-id.
///
/// # Errors
/// `NotPermitted`.
pub(super) fn change_list(caller: &Caller, found: &Attributes) -> Result<bool> {
    if !is_owner(caller, found) {
        return Err(FsError::NotPermitted);
    }
    Ok(found.mode & S_ISGID != 0 && !acts_as_group(caller, found.gid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileKind, Ino};

    /// Nobody's thread: it has no capabilities and no groups beside its own.
    fn caller(uid: u32, gid: u32) -> Caller {
        Caller { uid, gid, ..Caller::default() }
    }

    fn found(mode: u32) -> Attributes {
        let time = crate::Time { seconds: 1, nanos: 0 };
        crate::inode::Inode::new(Ino(7), 1, libc_file() | mode, 10, 20, time).attributes()
    }

    fn libc_file() -> u32 {
        nix::libc::S_IFREG
    }

    #[test]
    fn only_the_owner_changes_what_only_owners_may() {
        let file = found(0o644);
        assert_eq!(file.kind, FileKind::File);
        let mode = |mode| SetAttributes { mode: Some(mode), ..SetAttributes::default() };
        let ask = |who: Caller, set| change(&who, false, &file, set);
        let (owner, other, root) = (caller(10, 20), caller(11, 20), caller(0, 0));
        for (who, right) in [(owner, true), (other, false), (root, true)] {
            assert_eq!(ask(who, mode(0o4755)).is_ok(), right);
            assert_eq!(change(&who, true, &file, SetAttributes::default()).is_ok(), right, "times");
            assert!(ask(who, SetAttributes::default()).is_ok(), "the time of now is a matter of who may write");
            assert_eq!(change_list(&who, &file).is_ok(), right);
        }
        let owned = |uid, gid| SetAttributes { uid, gid, ..SetAttributes::default() };
        for (who, set, right) in [
            (owner, owned(Some(10), None), true),
            (owner, owned(Some(11), None), false),
            (owner, owned(None, Some(20)), true),
            (owner, owned(None, Some(21)), false),
            (caller(10, 21), owned(None, Some(21)), true),
            (other, owned(Some(10), None), false),
            (other, owned(None, Some(20)), false),
            (root, owned(Some(11), Some(22)), true),
        ] {
            assert_eq!(ask(who, set).is_ok(), right, "{who:?} {set:?}");
        }
    }

    #[test]
    fn what_the_kernel_takes_from_a_program_that_is_written_to_goes_whoever_writes() {
        let program = found(0o6775);
        let mode = |mode| SetAttributes { mode: Some(mode), ..SetAttributes::default() };
        let writer = caller(11, 20);
        assert!(change(&writer, false, &program, mode(0o775)).is_ok());
        assert!(change(&writer, false, &program, mode(0o2775)).is_ok());
        assert!(change(&writer, false, &program, mode(0o755)).is_err());
        assert!(change(&writer, false, &found(0o775), mode(0o4775)).is_err());
    }

    #[test]
    fn who_is_not_in_the_group_cannot_lend_it() {
        let set = SetAttributes { mode: Some(0o2755), ..SetAttributes::default() };
        let given = |who: Caller| change(&who, false, &found(0o755), set).unwrap().mode;
        assert_eq!(given(caller(10, 20)), Some(0o2755));
        assert_eq!(given(caller(10, 21)), Some(0o755));
        assert_eq!(given(caller(0, 0)), Some(0o2755));
        assert_eq!(change_list(&caller(10, 21), &found(0o2755)), Ok(true));
        assert_eq!(change_list(&caller(10, 20), &found(0o2755)), Ok(false));
    }
}
