//! Tests of what the kernel is let believe.

use super::*;

const TTL: Duration = Duration::from_secs(1);

/// To a thread, of a version.
fn answer(thread: u32, version: u64) -> Answer {
    Answer { thread, generation: 1, version: Some(version), looked_up: false, found: None, how: How::Ordinary }
}

fn look_up(thread: u32, version: u64) -> Answer {
    Answer { looked_up: true, ..answer(thread, version) }
}

/// The kernel may know millions of inodes, and gives them up only when it needs their memory: about 1 KiB each.
#[test]
fn an_inode_takes_a_tenth_of_what_it_takes_in_the_kernel() {
    assert!(size_of::<Inode>() <= 80, "{}", size_of::<Inode>());
}

#[test]
fn an_answer_overtaken_by_a_revocation_is_not_believed() {
    let known = Known::new();
    let directory = |thread| Answer { version: None, ..answer(thread, 0) };
    let ask = |thread| known.tell(known.begin(), 7, directory(thread), TTL);
    assert_eq!(known.tell(known.begin(), 7, Answer { looked_up: true, ..directory(0) }, TTL), TTL);
    let late = known.begin();
    assert!(known.revoke(7).attributes);
    assert_eq!(known.tell(late, 7, directory(20), TTL), Duration::ZERO);
    assert!(!known.revoke(7).attributes, "nothing was believed, so nothing is to be forgotten");
    // The first answer since: nothing may make the kernel drop it, so there must be nothing to take back.
    assert_eq!(ask(21), Duration::ZERO);
    assert_eq!(ask(22), Duration::ZERO, "21 may still be asleep");
    assert!(!known.revoke(7).attributes);
    assert_eq!(ask(21), Duration::ZERO, "an answer before a revocation");
    assert_eq!(ask(21), TTL, "it has taken that one in");
    assert_eq!(ask(22), TTL);
    assert!(known.revoke(7).attributes);
}

/// Of a version, in which the file has a size of 10.
fn data(version: u64) -> Data {
    Data { version, size: 10 }
}

/// A thread of ours (9) asks the kernel, which is seen to have what it was told.
fn ask(known: &Known, version: u64, whole: bool) -> Seen {
    known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, version) }, Duration::ZERO);
    known.took_in(7, 9, 10, whole, false)
}

#[test]
fn a_revoked_file_is_believed_only_when_the_kernel_was_seen_to_have_all_of_it() {
    let known = Known::new();
    let told = || known.tell(known.begin(), 7, answer(1, 1), TTL);
    let doubt = || known.doubt(7, 1, data(1));
    assert_eq!(known.tell(known.begin(), 7, look_up(1, 1), TTL), TTL);
    known.revoke(7);
    assert_eq!((doubt(), told(), told()), (true, Duration::ZERO, Duration::ZERO));
    assert_eq!(ask(&known, 1, false), Seen::Done, "it had that version all the time");
    assert_eq!((doubt(), told()), (true, Duration::ZERO), "the mode may be another");
    // Revoked while it was asked.
    known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, 1) }, Duration::ZERO);
    known.revoke(7);
    assert_eq!((known.took_in(7, 9, 10, true, false), told()), (Seen::Done, Duration::ZERO));
    assert_eq!((ask(&known, 1, true), doubt(), told()), (Seen::Done, false, TTL));
}

#[test]
fn a_forced_answer_keeps_what_is_newer_in_doubt_until_its_thread_is_heard() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell(known.begin(), 7, Answer { how: How::Forced, ..answer(3, 2) }, Duration::ZERO);
    assert!(known.is_behind(7, data(2)), "that it will take this in is not relied on");
    assert_eq!(ask(&known, 2, true), Seen::Done, "it is the same");
    assert!(!known.doubt(7, 1, data(2)));
    // Another node writes.
    assert_eq!(ask(&known, 3, true), Seen::Again);
    assert!(known.is_behind(7, data(3)));
    known.hear(7, 3);
    assert_eq!(ask(&known, 3, true), Seen::Done);
    known.tell(known.begin(), 7, Answer { how: How::Forced, ..answer(3, 2) }, Duration::ZERO);
    assert!(known.doubt(7, 1, data(3)));
    known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, 3) }, Duration::ZERO);
    assert_eq!(known.took_in(7, 9, 10, true, true), Seen::Done, "borne with");
    // Of the same version, but the mode is another by now.
    known.tell(known.begin(), 7, Answer { how: How::Forced, ..answer(3, 3) }, Duration::ZERO);
    known.revoke(7);
    assert_eq!(ask(&known, 3, true), Seen::Again);
    known.hear_gone(7, |thread| thread == 3);
    assert_eq!(ask(&known, 3, true), Seen::Done);
    assert!(!known.doubt(7, 1, data(3)));
}

#[tokio::test(start_paused = true)]
async fn pages_are_purged_for_mappings_only_if_no_answer_does_it() {
    let known = Known::new();
    let now = |forgotten: Forgotten| known.refresh(7, forgotten.revocation, || true);
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell_pages(7, 1, 1);
    let first = known.revoke(7);
    assert!(first.pages);
    let asking = known.ask();
    assert_eq!(now(first), Refresh::Later(BUSY));
    drop(asking);
    assert_eq!(known.refresh(7, first.revocation, || false), Refresh::Later(BUSY));
    known.tell(known.begin(), 7, answer(1, 2), TTL);
    let second = known.revoke(7);
    assert_eq!(now(first), Refresh::Needless, "that is left to the newer one");
    assert_eq!(now(second), Refresh::Later(ASKS_AGAIN), "somebody asked a moment ago, and will again");
    tokio::time::advance(ASKS_AGAIN).await;
    // An access time that is set in between does not make the pages any younger.
    let changed = known.changed(7);
    assert!(changed.pages);
    assert_eq!((now(second), now(changed)), (Refresh::Needless, Refresh::Now));
    assert!(!known.revoke(7).pages, "they are being purged");
}

#[test]
fn a_list_that_was_told_is_taken_back_though_attributes_were_told_for_no_time() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), Duration::ZERO);
    assert!(!known.revoke(7).attributes);
    let start = known.begin();
    assert!(known.tell_list(start, 1, 7));
    assert!(known.revoke(7).attributes);
    assert!(!known.tell_list(start, 1, 7), "it may be an older one");
    assert!(!known.revoke(7).attributes, "nothing was told since");
}

#[test]
fn a_read_waits_until_the_kernel_has_its_version_and_no_other_pages() {
    let known = Known::new();
    let doubtful = |thread, version| known.doubt(7, thread, data(version));
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell_pages(7, 1, 1);
    assert!(!doubtful(2, 1), "it was made with that");
    assert!(doubtful(2, 2) && known.is_behind(7, data(2)));
    // Somebody was told, and comes again: he may have lost it.
    known.tell(known.begin(), 7, answer(3, 2), TTL);
    known.hear(7, 3);
    assert!(doubtful(2, 2) && known.is_behind(7, data(2)));
    assert_eq!(ask(&known, 4, true), Seen::Purge);
    assert!(doubtful(2, 4));
    assert!(known.is_behind(7, data(4)));
    known.tell_pages(7, 2, 4);
    known.purged(7);
    assert!(!doubtful(2, 4) && !known.is_behind(7, data(4)));
    assert!(doubtful(2, 5), "pages that were read while the others were purged");
}

#[test]
fn what_an_answer_says_nothing_of_is_in_doubt_until_the_kernel_was_asked() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    assert!(known.changed(7).attributes);
    assert!(!known.doubt(7, 1, data(1)), "a time is in the answer that is asked for");
    known.tell_pages(7, 1, 1);
    assert!(known.unsettle(7).pages);
    let told = || known.tell(known.begin(), 7, answer(1, 1), TTL);
    assert_eq!((told(), ask(&known, 1, true), told()), (Duration::ZERO, Seen::Done, TTL));
}

#[tokio::test]
async fn who_changes_a_file_is_not_answered_while_the_kernel_is_asked_about_it() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    let mut changing = known.change(7, 2, None).0.expect("it is known");
    assert!(!known.doubt(7, 1, data(1)), "it may be later than what is told");
    changing.reach(Reach { end: 20, zeros: false });
    assert!(known.doubt(7, 1, data(1)), "it ended beyond what is told: another node has cut the file since");
    let held = known.hold(7);
    let mut finish = Box::pin(changing.finish());
    assert!(poll(&mut finish).is_pending());
    assert!(known.doubt(7, 1, data(1)));
    drop(held);
    finish.await;
    assert!(known.doubt(7, 1, data(1)), "it may not have taken in that it is done");
    known.hear(7, 2);
    assert!(!known.doubt(7, 1, data(1)));
    // And so if the thread is gone.
    known.change(7, 2, None).0.expect("it is known").reach(Reach { end: 20, zeros: false });
    assert!(known.doubt(7, 1, data(1)));
    known.hear_gone(7, |thread| thread == 2);
    assert!(!known.doubt(7, 1, data(1)));
}

#[test]
fn a_read_beside_an_append_waits_if_another_node_has_cut_the_file() {
    let known = Known::new();
    let append = |alone| known.change(7, 2, Some(Append { end: 15, alone })).0.expect("it is known");
    let doubtful = || known.doubt(7, 1, data(1));
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    let first = append(true);
    assert!(!doubtful(), "it ends where the kernel takes it to end");
    known.revoke(7);
    assert_eq!(ask(&known, 1, true), Seen::Again);
    drop(first);
    assert!(doubtful());
    assert_eq!(ask(&known, 1, true), Seen::Done, "it has failed");
    assert!(!doubtful());
    let _second = append(false);
    assert!(doubtful(), "another mount can have cut it");
}

#[test]
fn zeros_that_the_kernel_makes_in_pages_may_be_over_what_another_node_wrote() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    let mut changing = known.change(7, 2, None).0.expect("it is known");
    changing.reach(Reach { end: 0, zeros: true });
    drop(changing);
    // Another node writes, and it is read here.
    assert_eq!(ask(&known, 3, true), Seen::Again);
    known.tell_pages(7, 1, 3);
    known.hear(7, 2);
    assert!(known.doubt(7, 1, data(3)));
    assert_eq!(ask(&known, 3, true), Seen::Purge);
    known.purged(7);
    known.tell_pages(7, 1, 3);
    assert!(!known.doubt(7, 1, data(3)));
}

fn poll(future: &mut (impl Future<Output = ()> + Unpin)) -> std::task::Poll<()> {
    std::pin::Pin::new(future).poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

#[test]
fn an_inode_that_is_forgotten_and_looked_up_again_is_in_doubt() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell(known.begin(), 7, look_up(2, 1), TTL);
    known.take_back(7, 1);
    assert!(!known.doubt(7, 1, data(1)), "that answer was not sent");
    known.tell(known.begin(), 7, look_up(2, 1), TTL);
    known.forget(7, 1);
    assert!(known.doubt(7, 1, data(1)), "it may be made anew of an older answer");
}

#[test]
fn attributes_are_not_believed_beside_old_pages() {
    let known = Known::new();
    let told = |version| known.tell(known.begin(), 7, answer(1, version), TTL);
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell_pages(7, 1, 1);
    assert_eq!((told(1), told(2)), (TTL, Duration::ZERO));
    assert_eq!(ask(&known, 2, true), Seen::Purge);
    assert_eq!(told(2), Duration::ZERO, "they are being purged");
    known.purged(7);
    assert_eq!(told(2), TTL);
}

#[test]
fn where_the_kernel_cannot_be_asked_it_is_taken_for_granted_after_one_answer() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 1), TTL);
    known.tell_pages(7, 1, 1);
    known.revoke(7);
    assert!(known.doubt(7, 1, data(2)));
    known.assume(7, 2);
    assert!(!known.doubt(7, 1, data(2)));
    assert!(known.doubt(7, 1, data(3)));
}

#[test]
fn after_all_tokens_were_lost_no_version_is_what_it_was() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(1, 3), TTL);
    known.tell_pages(7, 1, 3);
    assert!(!known.is_behind(7, data(3)));
    known.revoke_all();
    assert!(known.is_behind(7, data(3)) && !known.keeps_pages(7, 2, 3));
}

#[test]
fn what_is_changed_leaves_nothing_behind_once_its_thread_is_heard() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(2, 1), TTL);
    let ask = |version| known.tell(known.begin(), 7, answer(1, version), TTL);
    let (changing, believed) = known.change(7, 2, None);
    assert!(believed, "what would be older than what others can read soon");
    assert_eq!(ask(1), Duration::ZERO);
    assert!(!known.change(7, 3, None).1);
    known.hear(7, 3);
    drop(changing);
    assert!(known.is_changing(7), "it may not have taken that in");
    assert_eq!(ask(1), TTL);
    known.hear(7, 2);
    assert!(!known.is_changing(7));
    assert!(known.shard(7).lock().get(&7).is_some_and(|inode| inode.rest.is_none()));
}

#[test]
fn a_directory_is_looked_in_while_a_name_is_looked_up() {
    let known = Known::new();
    known.tell(known.begin(), 1, Answer { version: None, ..look_up(0, 0) }, TTL);
    assert!(known.look_in(2).is_none());
    let (one, other) = (known.look_in(1), known.look_in(1));
    drop(one);
    known.hear(1, 5);
    assert!(known.is_looked_in(1));
    drop(other);
    known.tell(known.begin(), 1, Answer { version: None, ..answer(5, 0) }, TTL);
    assert!(!known.is_looked_in(1));
}

#[test]
fn an_unknown_inode_revoked_meanwhile_is_not_believed() {
    let known = Known::new();
    let start = known.begin();
    known.revoke(7);
    assert_eq!(known.tell(start, 7, look_up(0, 1), TTL), Duration::ZERO);
}

#[test]
fn pages_are_kept_only_while_the_data_is_the_same() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(0, 1), TTL);
    assert!(known.keeps_pages(7, 1, 1));
    known.tell_pages(7, 0, 1);
    assert!(known.keeps_pages(7, 1, 1));
    assert!(!known.keeps_pages(7, 1, 2) && !known.keeps_pages(7, 1, 2), "others may read them until they are dropped");
}

#[test]
fn forgetting_drops_the_inode_and_a_new_generation_starts_afresh() {
    let known = Known::new();
    known.tell(known.begin(), 7, look_up(0, 1), TTL);
    known.tell_pages(7, 0, 1);
    known.tell(known.begin(), 7, Answer { generation: 2, ..look_up(0, 9) }, TTL);
    assert!(!known.is_behind(7, data(9)));
    known.forget(7, 1);
    assert!(known.contains(7));
    known.forget(7, 1);
    assert!(!known.contains(7));
}

#[tokio::test(start_paused = true)]
async fn names_run_out_and_are_not_cached_in_a_directory_shared_with_writers() {
    let known = Known::new();
    let tell = || known.tell_name(known.begin(), 1, TTL);
    known.tell(known.begin(), 1, Answer { version: None, ..look_up(0, 0) }, TTL);
    assert_eq!(tell(), names::LIFETIME);
    tokio::time::advance(names::LIFETIME).await;
    assert_eq!(known.revoke(1).names, names::RUN_OUT - names::LIFETIME);
    assert_eq!(known.revoke(1).names, Duration::ZERO);
    assert_eq!(tell(), Duration::ZERO);
    tokio::time::advance(names::SHARED * 2).await;
    assert_eq!(tell(), names::LIFETIME);
    assert_eq!(known.revoke(1).names, names::RUN_OUT);
    // Again: it was too short.
    tokio::time::advance(names::SHARED * 3).await;
    assert_eq!(tell(), Duration::ZERO);
    tokio::time::advance(names::SHARED).await;
    assert_eq!(tell(), names::LIFETIME);
    // Nobody has to wait for names that were told long ago.
    tokio::time::advance(names::SHARED_MAX).await;
    assert_eq!(known.revoke(1).names, Duration::ZERO);
    tokio::time::advance(names::SHARED).await;
    assert_eq!(tell(), names::LIFETIME);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_moved_is_believed_where_it_was_moved_to() {
    let known = Known::new();
    for directory in [1, 2, 3] {
        known.tell(known.begin(), directory, Answer { version: None, ..look_up(0, 0) }, TTL);
    }
    let tell = |directory| known.tell_name(known.begin(), directory, TTL);
    drop(known.move_name(1, 2));
    assert_eq!(known.revoke(2).names, Duration::ZERO, "nothing was told");
    tokio::time::advance(names::SHARED).await;
    assert_eq!(tell(1), names::LIFETIME);
    tokio::time::advance(names::LIFETIME).await;
    assert!(known.move_name(1, 1).is_none());
    drop(known.move_name(1, 2));
    assert_eq!(known.revoke(2).names, names::RUN_OUT - names::LIFETIME);
    // Others use the second directory. From now on nothing is told in the first one, which would be moved there.
    drop(known.move_name(1, 2));
    assert_eq!(known.revoke(2).names, names::RUN_OUT - names::LIFETIME);
    assert_eq!(tell(1), Duration::ZERO);
    // That is so for a while, however many are moved.
    (0..3).for_each(|_| drop(known.move_name(1, 2)));
    tokio::time::advance(names::RUN_OUT).await;
    known.revoke(2);
    drop(known.move_name(1, 2));
    assert_eq!(known.revoke(2).names, Duration::ZERO);
    tokio::time::advance(names::SHARED * 2).await;
    assert_eq!(tell(1), names::LIFETIME);
    // Until who moves one is answered nobody is told any.
    let moving = known.move_name(1, 3);
    assert_eq!(tell(1), Duration::ZERO);
    drop(moving);
    assert_eq!(tell(1), names::LIFETIME);
}

#[test]
fn a_change_of_a_directory_overtakes_what_other_threads_were_answered() {
    let known = Known::new();
    let answer = |thread| Answer { version: None, ..look_up(thread, 0) };
    let tell = |thread| known.tell(known.begin(), 7, answer(thread), TTL);
    assert!(!known.overtake(7, 1), "the kernel does not know it");
    assert_eq!(tell(1), TTL);
    let slow = known.begin();
    assert!(!known.overtake(7, 1), "its own answer a thread has taken in");
    assert_eq!(known.tell(slow, 7, answer(3), TTL), Duration::ZERO, "it may be from before the change");
    assert_eq!(tell(2), TTL);
    known.hear(7, 2);
    assert!(!known.overtake(7, 1), "it has come again");
    assert_eq!(tell(2), TTL);
    assert!(known.overtake(7, 1) && !known.overtake(7, 1));
    assert_eq!((tell(2), tell(1)), (TTL, TTL));
    assert!(known.overtake(7, 1), "one of two");
    assert_eq!(tell(2), TTL);
    assert!(known.revoke(7).attributes && !known.overtake(7, 1), "it was taken back");
}
