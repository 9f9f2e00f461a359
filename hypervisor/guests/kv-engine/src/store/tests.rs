use super::*;
use crate::{Limits, Output};
use std::format;
use std::string::String;

fn at(millis: u64) -> Now {
    Now::from_micros(millis * 1000)
}

fn new() -> Store {
    Store::new(Config::default(), at(0))
}

fn set(store: &mut Store, key: &str, deadline: u64, now: u64) {
    let deadline = Some(Deadline::at(deadline));
    store
        .set(0, key.as_bytes(), Value::Copy(b"v"), deadline, at(now))
        .unwrap();
}

#[test]
fn keys_are_removed_in_the_order_of_their_deadlines() {
    let mut store = new();
    for number in 0..100 {
        set(&mut store, &format!("k{number}"), 1000 + number, 0);
    }
    assert_eq!(store.next_deadline(), Some(1000));
    assert_eq!(
        store.expire_cycle(at(1000), 1000),
        Expired {
            removed: 0,
            more: false
        }
    );
    assert_eq!(
        store.expire_cycle(at(1050), 20),
        Expired {
            removed: 20,
            more: true
        }
    );
    assert_eq!(
        store.expire_cycle(at(1050), 1000),
        Expired {
            removed: 30,
            more: false
        }
    );
    assert_eq!((store.len(0), store.next_deadline()), (50, Some(1050)));
    assert!(store.get(0, b"k49", at(1050)).is_none());
    assert!(store.get(0, b"k50", at(1050)).is_some());
}

#[test]
fn a_deadline_can_move_and_go() {
    let mut store = new();
    set(&mut store, "later", 1000, 0);
    set(&mut store, "earlier", 1000, 0);
    set(&mut store, "never", 1000, 0);
    for (key, deadline) in [
        ("later", Deadline::at(2000)),
        ("earlier", Deadline::at(500)),
        ("never", Deadline::NEVER),
    ] {
        assert_eq!(
            store.set_deadline(0, key.as_bytes(), deadline, at(0)),
            Ok(true)
        );
    }
    assert_eq!(store.expire_cycle(at(501), 100).removed, 1);
    assert_eq!(store.expire_cycle(at(1500), 100).removed, 0);
    assert_eq!(store.next_deadline(), Some(2000));
    assert_eq!(store.expire_cycle(at(2001), 100).removed, 1);
    assert_eq!((store.len(0), store.next_deadline()), (1, None));
}

#[test]
fn the_expiry_heap_does_not_grow_without_bound() {
    let mut store = new();
    for key in [b"a", b"b", b"a"] {
        let forever = Some(Deadline::NEVER);
        store
            .set(0, key, Value::Copy(b"v"), forever, at(0))
            .unwrap();
    }
    assert!(store.deadlines.is_empty());
    for round in 0..50_000u64 {
        // The same key again and again, and keys that are deleted, and keys that are made to stay.
        set(&mut store, "same", 1_000_000 - round, 0);
        set(&mut store, "gone", 2_000_000, 0);
        store.remove(0, b"gone", at(0)).unwrap();
        set(&mut store, "stays", 3_000_000 - round, 0);
        store
            .set_deadline(0, b"stays", Deadline::NEVER, at(0))
            .unwrap();
    }
    assert!(
        store.deadlines.len() < 2 * HEAP_SLACK,
        "{}",
        store.deadlines.len()
    );
    assert_eq!(store.expire_cycle(at(5_000_000), usize::MAX).removed, 1);
    assert_eq!((store.deadlines.len(), store.len(0)), (0, 3));
}

#[test]
fn the_books_are_right_after_all() {
    let mut store = new();
    let empty = store.used_memory();
    for number in 0..10_000u64 {
        let key = format!("key {}", number * 7919 % 500);
        let value = std::vec![b'v'; (number % 300) as usize];
        let deadline = (number % 3 == 0).then_some(Deadline::at(1000 + number));
        store
            .set(
                (number % 3) as usize,
                key.as_bytes(),
                Value::Copy(&value),
                deadline,
                at(0),
            )
            .unwrap();
        let length = value.len();
        store
            .write_at((number % 3) as usize, key.as_bytes(), length / 2, b"more")
            .unwrap();
        if number % 4 == 0 {
            store.remove((number % 3) as usize, key.as_bytes(), at(0));
        }
    }
    store.expire_cycle(at(5000), usize::MAX);
    let counted: usize = store.databases.iter().map(Keyspace::memory).sum();
    assert_eq!(store.data, counted);
    assert!(store.used_memory() > empty);
    store.flush_all();
    assert_eq!(store.used_memory(), empty);
    assert!(store.is_empty());
}

/// Runs some commands; the replies.
fn replies(seed: [u64; 2]) -> String {
    let config = Config {
        seed,
        ..Config::default()
    };
    let mut store = Store::new(config, at(0));
    let mut session = store.connect(None, at(0));
    let mut out = Output::new();
    let mut input: String = (0..200)
        .map(|number| format!("SET key{number} v\r\n"))
        .collect();
    input += "DEL key7 key9\r\nKEYS *\r\nINFO server\r\n";
    session.run(
        &mut store,
        at(5),
        input.as_bytes(),
        &mut out,
        Limits::default(),
    );
    String::from_utf8(out.pending().to_vec()).unwrap()
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    assert_eq!(replies([1, 2]), replies([1, 2]));
    assert_ne!(replies([1, 2]), replies([1, 3]));
}
