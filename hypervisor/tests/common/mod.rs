//! What tests of a recorder put together.

use std::sync::Arc;
use std::time::Instant;

use hypervisor::backends::wait::Wake;
use hypervisor::clock::GuestClock;
use hypervisor::entry::Base;
use hypervisor::event::{GuestTime, Output};
use hypervisor::gate::{Gate, Sent};
use hypervisor::machine::Machine;
use hypervisor::orders::{Orders, Samples};
use hypervisor::outlet::Outlet;
use hypervisor::record::{Parts, RecordOptions, random_source};
use hypervisor::sink::NoLog;
use hypervisor::stage::Stage;
use hypervisor::world::World;

struct Nowhere;

impl World for Nowhere {
    fn send(&mut self, _: &Output) -> Sent {
        Sent::Done
    }
}

/// A descriptor that nobody waits for.
pub fn wake() -> Arc<Wake> {
    Arc::new(Wake::new().unwrap())
}

/// The parts of a recorder of this machine that logs nowhere, and lets everything out to nowhere. Its stage and its orders are what it is
/// talked to by.
pub fn parts(machine: Machine) -> Parts<NoLog> {
    Parts {
        machine,
        sink: NoLog::default(),
        base: Base::default(),
        outlet: Outlet::new(Gate::new(), Box::new(Nowhere)),
        stage: Arc::new(Stage::new(wake())),
        orders: Arc::new(Orders::new(wake())),
        samples: Arc::new(Samples::default()),
        clock: GuestClock::starting(GuestTime(0), Instant::now()),
        options: RecordOptions::default(),
        random: random_source().unwrap(),
        desk: None,
        intervals: None,
    }
}
