//! Which connection a received frame belongs to.

use crate::flows::Flow;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Address, Ipv4Packet, TcpPacket,
};

/// A TCP segment for the server's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) flow: Flow,
    /// It asks for a new connection: SYN without ACK.
    pub(crate) opens: bool,
}

impl Segment {
    /// Looks at a frame; `None` for all that is no segment for this port of this address. Nothing is verified here
    /// beyond what is read: smoltcp checks the frame again.
    pub(crate) fn parse(frame: &[u8], address: Ipv4Address, port: u16) -> Option<Self> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        if ethernet.ethertype() != EthernetProtocol::Ipv4 {
            return None;
        }
        let packet = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
        if packet.next_header() != IpProtocol::Tcp
            || packet.dst_addr() != address
            || packet.more_frags()
            || packet.frag_offset() != 0
        {
            return None;
        }
        let source = packet.src_addr();
        let segment = TcpPacket::new_checked(packet.payload()).ok()?;
        (segment.dst_port() == port).then(|| Self {
            flow: Flow::new(source, segment.src_port()),
            opens: segment.syn() && !segment.ack(),
        })
    }
}
