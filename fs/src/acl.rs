//! POSIX access control lists: what they mean for the mode, and what new files inherit. Stored as the kernel passes them, in
//! the extended attributes [`ACCESS`] and [`DEFAULT`].
//!
//! ```text
//! u32 version (2), entries: u16 tag, u16 permissions, u32 id
//! ```
//!
//! Invariants:
//! - A list that is kept says more than the mode: one that says the same becomes the mode, and is not kept.
//! - The mode's group bits are the list's mask; owner's and others' bits are those of the list.
//!
//! Excludes: checking access (the kernel does).

use crate::error::{FsError, Result};
use crate::format::{get_u16, get_u32};

/// Name of the attribute with the list that governs access.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of a directory's attribute with the list that new files in it get.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEAD: usize = 4;
const ENTRY: usize = 8;
const NO_ID: u32 = u32::MAX;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// An access control list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    entries: Vec<Entry>,
}

impl Acl {
    /// Reads a list; `None` for one without entries, which means that there is to be none.
    ///
    /// # Errors
    /// `NotSupported` for an unknown version, `Invalid` if it is not a list in the right order with all that it must have.
    pub fn decode(bytes: &[u8]) -> Result<Option<Acl>> {
        const BAD: FsError = FsError::Invalid("not an access control list");
        if bytes.len() < HEAD {
            return Err(BAD);
        }
        if get_u32(bytes, 0) != VERSION {
            return Err(FsError::NotSupported);
        }
        if !(bytes.len() - HEAD).is_multiple_of(ENTRY) {
            return Err(BAD);
        }
        let entries: Vec<Entry> = bytes[HEAD..]
            .chunks_exact(ENTRY)
            .map(|e| {
                let tag = get_u16(e, 0);
                let id = if matches!(tag, USER | GROUP) { get_u32(e, 4) } else { NO_ID };
                Entry { tag, perm: get_u16(e, 2), id }
            })
            .collect();
        if entries.is_empty() {
            return Ok(None);
        }
        let count = |tag| entries.iter().filter(|e| e.tag == tag).count();
        let named = count(USER) + count(GROUP);
        let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER];
        let right = entries.windows(2).all(|w| w[0].tag <= w[1].tag)
            && entries.iter().all(|e| e.perm & !7 == 0 && known.contains(&e.tag))
            && entries.iter().all(|e| !matches!(e.tag, USER | GROUP) || e.id != NO_ID)
            && [USER_OBJ, GROUP_OBJ, OTHER].into_iter().all(|tag| count(tag) == 1)
            && (count(MASK) == 1 || named == 0 && count(MASK) == 0);
        if right { Ok(Some(Acl { entries })) } else { Err(BAD) }
    }

    /// The list's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.tag.to_le_bytes());
            bytes.extend_from_slice(&entry.perm.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    fn perm(&mut self, tag: u16) -> Option<&mut u16> {
        self.entries.iter_mut().find(|e| e.tag == tag).map(|e| &mut e.perm)
    }

    /// The mask, or the owning group's entry in a list without one: what the mode's group bits show.
    fn group_class(&mut self) -> Option<&mut u16> {
        let tag = if self.entries.iter().any(|e| e.tag == MASK) { MASK } else { GROUP_OBJ };
        self.perm(tag)
    }

    /// Whether a mode says all that the list does.
    #[must_use]
    pub fn is_mode(&self) -> bool {
        self.entries.iter().all(|e| matches!(e.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    /// A mode with the permissions as the list has them.
    #[must_use]
    pub fn mode(&self, mode: u32) -> u32 {
        let mut list = self.clone();
        let bits = |perm: Option<&mut u16>| u32::from(perm.map_or(0, |p| *p));
        let group = bits(list.group_class());
        let (owner, other) = (bits(list.perm(USER_OBJ)), bits(list.perm(OTHER)));
        mode & !0o777 | owner << 6 | group << 3 | other
    }

    /// The list after its file's mode was set.
    #[must_use]
    pub fn with_mode(mut self, mode: u32) -> Acl {
        let set = |perm: Option<&mut u16>, bits: u32| {
            if let Some(perm) = perm {
                *perm = (bits & 7) as u16;
            }
        };
        set(self.perm(USER_OBJ), mode >> 6);
        set(self.group_class(), mode >> 3);
        set(self.perm(OTHER), mode);
        self
    }

    /// What a file that is made with a mode, in a directory with this default list, gets: its mode, and its list if that says
    /// more. The caller's umask has no part in it.
    #[must_use]
    pub fn inherit(&self, mode: u32) -> (u32, Option<Acl>) {
        let both = mode & (self.mode(0) | !0o777);
        let list = self.clone().with_mode(both);
        (both, (!list.is_mode()).then_some(list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entries = entries.iter().map(|(tag, perm, id)| Entry { tag: *tag, perm: *perm, id: *id }).collect();
        Acl { entries }.encode()
    }

    const FULL: &[(u16, u16, u32)] =
        &[(USER_OBJ, 7, NO_ID), (USER, 6, 1000), (GROUP_OBJ, 5, NO_ID), (GROUP, 7, 50), (MASK, 6, NO_ID), (OTHER, 4, NO_ID)];

    #[test]
    fn lists_come_back_and_wrong_ones_are_refused() {
        let bytes = acl(FULL);
        let list = Acl::decode(&bytes).unwrap().unwrap();
        assert_eq!(list.encode(), bytes);
        assert!(Acl::decode(&bytes[..4]).unwrap().is_none());
        assert!(Acl::decode(&bytes[..bytes.len() - 1]).is_err());
        assert_eq!(Acl::decode(&[1, 0, 0, 0]), Err(FsError::NotSupported));
        for left_out in 0..FULL.len() {
            let mut entries = FULL.to_vec();
            let tag = entries.remove(left_out).0;
            assert_eq!(Acl::decode(&acl(&entries)).is_ok(), matches!(tag, USER | GROUP), "without {tag}");
        }
        let mut disordered = FULL.to_vec();
        disordered.swap(0, 1);
        assert!(Acl::decode(&acl(&disordered)).is_err());
        assert!(Acl::decode(&acl(&[(USER_OBJ, 8, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 4, NO_ID)])).is_err());
    }

    #[test]
    fn the_group_bits_are_the_mask() {
        let list = Acl::decode(&acl(FULL)).unwrap().unwrap();
        assert!(!list.is_mode());
        assert_eq!(list.mode(0o102_000), 0o102_764);
        let changed = list.clone().with_mode(0o640);
        assert_eq!(changed.mode(0), 0o640);
        assert_eq!(changed.entries[2].perm, 5, "the owning group's own entry stays");
        let plain = Acl::decode(&acl(&[(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 1, NO_ID)])).unwrap().unwrap();
        assert!(plain.is_mode());
        assert_eq!(plain.with_mode(0o640).mode(0), 0o640);
    }

    #[test]
    fn new_files_get_what_both_mode_and_default_list_allow() {
        let list = Acl::decode(&acl(FULL)).unwrap().unwrap();
        let (mode, inherited) = list.inherit(0o100_666);
        assert_eq!(mode, 0o100_664);
        let inherited = inherited.unwrap();
        assert_eq!(inherited.mode(0), 0o664);
        assert_eq!(inherited.entries[1].perm, 6, "named entries are inherited as they are");
        let plain = Acl::decode(&acl(&[(USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 0, NO_ID)])).unwrap().unwrap();
        assert_eq!(plain.inherit(0o100_666), (0o100_640, None));
    }
}
