//! The table of connections by the client's end. It is allocated once, for as many as there can be.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use smoltcp::wire::Ipv4Address;

/// A client's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow(u64);

impl Flow {
    pub(crate) fn new(address: Ipv4Address, port: u16) -> Self {
        Self(u64::from(address.to_bits()) << 16 | u64::from(port))
    }
}

/// Flows in order, each with the index of its connection.
#[derive(Debug)]
pub(crate) struct Flows(Vec<(Flow, u16)>);

impl Flows {
    pub(crate) fn with_capacity(capacity: usize) -> Result<Self, TryReserveError> {
        let mut flows = Vec::new();
        flows.try_reserve_exact(capacity)?;
        Ok(Self(flows))
    }

    pub(crate) fn find(&self, flow: Flow) -> Option<u16> {
        let at = self.place(flow).ok()?;
        Some(self.0[at].1)
    }

    /// Adds a flow that is not there yet.
    pub(crate) fn insert(&mut self, flow: Flow, index: u16) {
        match self.place(flow) {
            Ok(at) => self.0[at].1 = index,
            Err(at) => self.0.insert(at, (flow, index)),
        }
    }

    pub(crate) fn remove(&mut self, flow: Flow) {
        if let Ok(at) = self.place(flow) {
            self.0.remove(at);
        }
    }

    fn place(&self, flow: Flow) -> Result<usize, usize> {
        self.0.binary_search_by_key(&flow, |(flow, _)| *flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_found_until_they_are_removed() {
        let flow = |n: u32| {
            Flow::new(
                Ipv4Address::from_bits(0x0a00_0001 + n / 7),
                (n * 977) as u16,
            )
        };
        let mut flows = Flows::with_capacity(500).expect("memory");
        (0..500).for_each(|n| flows.insert(flow(n), n as u16));
        (0..500).step_by(2).for_each(|n| flows.remove(flow(n)));
        for n in 0..500 {
            assert_eq!(flows.find(flow(n)), (n % 2 == 1).then_some(n as u16));
        }
    }
}
