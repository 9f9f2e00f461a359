//! The machine on real KVM.

use super::*;

fn machine(guest: &str, words: &str) -> Machine {
    let spec = MachineSpec::new(guest, 4, words, 0).unwrap();
    Machine::new(&KvmSource::Path("/dev/kvm".into()), &spec).unwrap()
}

/// An order is given and the thread kicked just as it has looked for orders and goes into the guest: the kick must not be lost,
/// for this guest might make no exit for long.
#[test]
fn a_kick_before_the_run_ends_the_run() {
    let mut machine = machine("compute", "rounds=1");
    let kick = machine.kick_handle();
    for _ in 0..3 {
        kick.kick();
        kick.kick();
        let position = machine.position();
        assert_eq!(machine.step().unwrap(), Stepped::Kicked);
        assert_eq!(machine.position(), position);
        assert_eq!(machine.step().unwrap(), Stepped::SyncPoint);
        machine.outputs().for_each(drop);
    }
}
