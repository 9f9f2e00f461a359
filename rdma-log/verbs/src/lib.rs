//! The table of [`rdma_log::verbs::abi`] over libibverbs.
//!
//! It is built as `libdoppel_verbs.so` and loaded when RDMA is asked for, so that only then libibverbs has to be there.
//! Nothing is decided here: the functions do what the table's documentation says, with the calls of the library, and
//! hand its errors on. `IBV_ACCESS_RELAXED_ORDERING` is set nowhere.
//!
//! Unsafe, and why it holds:
//! - Pointers to structs come from `rdma_log`'s wrapper of the table, which passes live ones, and handles that a
//!   function here made and that were not given back.
//! - Objects of the library are used only between their making and their destruction, in the order that it asks for:
//!   queue pair before completion queue, all before the protection domain, that before the device.

mod device;
mod queue;

use std::mem::size_of;

use rdma_log::verbs::abi::{self, Failure, Step, Table};

static TABLE: Table = Table {
    abi: abi::ABI,
    size: size_of::<Table>() as u32,
    open: device::open,
    close: device::close,
    register: device::register,
    deregister: device::deregister,
    create: queue::create,
    connect: queue::connect,
    post: queue::post,
    expect: queue::expect,
    poll: queue::poll,
    arm: queue::arm,
    descriptor: device::descriptor,
    quiet: device::quiet,
    destroy: queue::destroy,
    devices: device::devices,
};

/// The table.
#[unsafe(no_mangle)]
pub extern "C" fn doppel_verbs_table() -> *const Table {
    &TABLE
}

/// The error number of the call before.
fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A failure unless the library returned 0; what it returned is an error number.
fn check(step: Step, returned: i32) -> Result<(), Failure> {
    match returned {
        0 => Ok(()),
        number => Err(Failure::of(step, number.abs())),
    }
}

fn said(result: Result<(), Failure>) -> Failure {
    result.err().unwrap_or(Failure::NONE)
}
