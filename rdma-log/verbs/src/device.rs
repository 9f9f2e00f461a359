//! Devices, ports, GIDs and registered memory.

use std::ffi::{CStr, c_void};
use std::mem::{MaybeUninit, zeroed};
use std::ptr::{self, null_mut};

use rdma_log::verbs::abi::{self, Failure, Keys, NAME, Port, Step, Wish};
use rdma_sys as ib;

use crate::{check, errno, said};

const ROCE_V2: &str = "RoCE v2";
/// IBV_LINK_LAYER_ETHERNET, which the bindings have no name for.
const ETHERNET: u8 = 2;
/// The most GIDs of a port that are looked at. Devices have up to a few hundred.
const GIDS: i32 = 256;

pub(crate) struct Device {
    pub(crate) context: *mut ib::ibv_context,
    pub(crate) domain: *mut ib::ibv_pd,
    pub(crate) channel: *mut ib::ibv_comp_channel,
    pub(crate) port: Port,
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: each was made by the library, is destroyed once, and what depended on it is gone: the caller's part.
        unsafe {
            if !self.channel.is_null() {
                ib::ibv_destroy_comp_channel(self.channel);
            }
            if !self.domain.is_null() {
                ib::ibv_dealloc_pd(self.domain);
            }
            ib::ibv_close_device(self.context);
        }
    }
}

/// The library's list of devices.
struct List {
    list: *mut *mut ib::ibv_device,
    count: usize,
}

impl List {
    fn get() -> Result<List, Failure> {
        let mut count = 0;
        // SAFETY: the argument is a live integer.
        let list = unsafe { ib::ibv_get_device_list(&mut count) };
        if list.is_null() {
            return Err(Failure::of(Step::List, errno()));
        }
        let count = usize::try_from(count).unwrap_or(0);
        Ok(List { list, count })
    }

    fn iter(&self) -> impl Iterator<Item = *mut ib::ibv_device> + '_ {
        // SAFETY: the list has `count` entries and lives as long as this.
        (0..self.count).map(|i| unsafe { *self.list.add(i) })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the library's list, given back once. Opened devices stay.
        unsafe { ib::ibv_free_device_list(self.list) };
    }
}

fn name(device: *mut ib::ibv_device) -> [u8; NAME] {
    let mut to = [0; NAME];
    // SAFETY: a device of a live list; its name is a terminated string that lives as long.
    let from = unsafe { CStr::from_ptr(ib::ibv_get_device_name(device)) }.to_bytes();
    let len = from.len().min(NAME - 1);
    to[..len].copy_from_slice(&from[..len]);
    to
}

fn text(name: &[u8; NAME]) -> &str {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
    std::str::from_utf8(&name[..end]).unwrap_or("")
}

pub(crate) unsafe extern "C" fn devices(
    to: *mut [u8; NAME],
    most: u32,
    count: *mut u32,
) -> Failure {
    let list = match List::get() {
        Ok(list) => list,
        Err(failure) => return failure,
    };
    for (i, device) in list.iter().take(most as usize).enumerate() {
        // SAFETY: the caller's array has `most` places.
        unsafe { to.add(i).write(name(device)) };
    }
    // SAFETY: the caller's live integer.
    unsafe { count.write(list.count as u32) };
    Failure::NONE
}

pub(crate) unsafe extern "C" fn open(
    wish: *const Wish,
    device: *mut *mut abi::Device,
    port: *mut Port,
) -> Failure {
    // SAFETY: the caller's live struct.
    let wish = unsafe { &*wish };
    said(find(wish).map(|found| {
        // SAFETY: the caller's live places.
        unsafe {
            port.write(found.port);
            device.write(Box::into_raw(Box::new(found)).cast());
        }
    }))
}

/// The device that is wished for, or the first that has an active port; the first failure if none has.
fn find(wish: &Wish) -> Result<Device, Failure> {
    let list = List::get()?;
    if list.count == 0 {
        return Err(Failure::of(Step::NoDevice, 0));
    }
    let any = wish.name[0] == 0;
    let mut first = None;
    for raw in list.iter().filter(|raw| any || name(*raw) == wish.name) {
        match open_one(raw, wish) {
            Ok(device) => return Ok(device),
            Err(failure) => first = first.or(Some(failure)),
        }
    }
    Err(first.unwrap_or(Failure::of(Step::UnknownDevice, 0)))
}

fn open_one(raw: *mut ib::ibv_device, wish: &Wish) -> Result<Device, Failure> {
    // SAFETY: a device of a live list.
    let context = unsafe { ib::ibv_open_device(raw) };
    if context.is_null() {
        return Err(Failure::of(Step::Open, errno()));
    }
    // SAFETY: of integers and arrays of them; zero is a value.
    let port = unsafe { zeroed() };
    let mut device = Device {
        context,
        domain: null_mut(),
        channel: null_mut(),
        port,
    };
    device.port.name = name(raw);
    // SAFETY: of integers; zero is a value.
    let mut attributes: ib::ibv_device_attr = unsafe { zeroed() };
    // SAFETY: an open device and a live struct.
    let rc = unsafe { ib::ibv_query_device(context, &mut attributes) };
    check(Step::QueryDevice, rc)?;
    device.port.max_requests = u32::try_from(attributes.max_qp_wr.min(attributes.max_cqe))
        .map_err(|_| Failure::of(Step::QueryDevice, 0))?;
    find_port(&mut device, wish, attributes.phys_port_cnt)?;
    // SAFETY: an open device.
    device.domain = unsafe { ib::ibv_alloc_pd(context) };
    if device.domain.is_null() {
        return Err(Failure::of(Step::Domain, errno()));
    }
    // SAFETY: an open device.
    device.channel = unsafe { ib::ibv_create_comp_channel(context) };
    if device.channel.is_null() {
        return Err(Failure::of(Step::Channel, errno()));
    }
    // SAFETY: the descriptor belongs to the channel just made; the call takes numbers.
    let rc = unsafe { libc::fcntl((*device.channel).fd, libc::F_SETFL, libc::O_NONBLOCK) };
    if rc < 0 {
        return Err(Failure::of(Step::Channel, errno()));
    }
    Ok(device)
}

/// Finds an active port and its GID.
fn find_port(device: &mut Device, wish: &Wish, ports: u8) -> Result<(), Failure> {
    let wished = if wish.port == 0 {
        1..=ports
    } else {
        wish.port..=wish.port
    };
    let mut first = Failure::of(Step::NoPort, 0);
    for number in wished {
        // SAFETY: of integers; zero is a value.
        let mut found: ib::ibv_port_attr = unsafe { zeroed() };
        // SAFETY: an open device and a live struct.
        let rc = unsafe { ib::___ibv_query_port(device.context, number, &mut found) };
        check(Step::QueryPort, rc)?;
        if found.state != ib::ibv_port_state::IBV_PORT_ACTIVE {
            continue;
        }
        let ethernet = found.link_layer == ETHERNET;
        device.port.port = number;
        device.port.lid = found.lid;
        device.port.mtu = found.active_mtu as u8;
        device.port.max_message = found.max_msg_sz;
        device.port.ethernet = u8::from(ethernet);
        match find_gid(device, wish.gid_index, found.gid_tbl_len) {
            Some((index, gid)) => {
                device.port.gid_index = index;
                device.port.gid = gid;
                return Ok(());
            }
            None => first = Failure::of(Step::NoGid, 0),
        }
    }
    Err(first)
}

/// The GID with that index; or the best on Ethernet: RoCE v2, of an IPv4 address, else of any but a link-local one.
/// InfiniBand goes by LIDs and takes the first.
fn find_gid(device: &Device, wished: i32, count: i32) -> Option<(u32, [u8; 16])> {
    let gid = |index: i32| {
        let mut gid = MaybeUninit::<ib::ibv_gid>::zeroed();
        // SAFETY: an open device and a live place; zero is a value of the union's bytes.
        let raw = unsafe {
            let rc = ib::ibv_query_gid(device.context, device.port.port, index, gid.as_mut_ptr());
            (rc == 0).then(|| gid.assume_init().raw)
        };
        let raw = raw.filter(|raw| *raw != [0; 16])?;
        Some((u32::try_from(index).ok()?, raw))
    };
    if wished >= 0 {
        return gid(wished);
    }
    if device.port.ethernet == 0 {
        return gid(0).or(Some((0, [0; 16])));
    }
    (0..count.min(GIDS))
        .filter(|index| is_roce_v2(&device.port, *index))
        .filter_map(gid)
        .max_by_key(|(index, gid)| (rank(gid), std::cmp::Reverse(*index)))
}

fn rank(gid: &[u8; 16]) -> u8 {
    let mapped = gid[..10] == [0; 10] && gid[10..12] == [0xff; 2];
    let link_local = gid[0] == 0xfe && gid[1] & 0xc0 == 0x80;
    match (mapped, link_local) {
        (true, _) => 2,
        (_, false) => 1,
        (_, true) => 0,
    }
}

/// The kernel tells a GID's kind in sysfs; the library's call for it is not in every version.
fn is_roce_v2(port: &Port, index: i32) -> bool {
    let path = format!(
        "/sys/class/infiniband/{}/ports/{}/gid_attrs/types/{index}",
        text(&port.name),
        port.port
    );
    std::fs::read_to_string(path).is_ok_and(|kind| kind.trim() == ROCE_V2)
}

pub(crate) unsafe extern "C" fn close(device: *mut abi::Device) {
    // SAFETY: made by `open`, given back once.
    drop(unsafe { Box::from_raw(device.cast::<Device>()) });
}

pub(crate) unsafe extern "C" fn register(
    device: *mut abi::Device,
    at: *mut u8,
    len: u64,
    peer_writes: u32,
    memory: *mut *mut abi::Memory,
    keys: *mut Keys,
) -> Failure {
    let access = if peer_writes == 1 {
        ib::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
            | ib::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
    } else {
        0
    };
    // SAFETY: an open device; the caller keeps the range mapped for as long as it is registered.
    let mr = unsafe {
        let device = &*device.cast::<Device>();
        ib::ibv_reg_mr(
            device.domain,
            at.cast::<c_void>(),
            len as usize,
            access as i32,
        )
    };
    if mr.is_null() {
        return Failure::of(Step::Register, errno());
    }
    // SAFETY: the region is live; the places are the caller's.
    unsafe {
        keys.write(Keys {
            local: (*mr).lkey,
            remote: (*mr).rkey,
        });
        memory.write(mr.cast());
    }
    Failure::NONE
}

pub(crate) unsafe extern "C" fn deregister(memory: *mut abi::Memory) -> Failure {
    // SAFETY: made by `register`, and given back until that succeeds.
    said(check(Step::Deregister, unsafe {
        ib::ibv_dereg_mr(memory.cast())
    }))
}

pub(crate) unsafe extern "C" fn descriptor(device: *mut abi::Device) -> i32 {
    // SAFETY: an open device.
    unsafe { (*(*device.cast::<Device>()).channel).fd }
}

pub(crate) unsafe extern "C" fn quiet(device: *mut abi::Device, count: *mut u32) -> Failure {
    // SAFETY: an open device.
    let channel = unsafe { (*device.cast::<Device>()).channel };
    let mut taken = 0;
    loop {
        let (mut queue, mut context) = (null_mut(), ptr::null_mut());
        // SAFETY: a live channel, which does not block, and live places; each event that came is acknowledged.
        unsafe {
            if ib::ibv_get_cq_event(channel, &mut queue, &mut context) != 0 {
                let number = errno();
                count.write(taken);
                let dry = number == libc::EAGAIN || number == libc::EINTR;
                return if dry {
                    Failure::NONE
                } else {
                    Failure::of(Step::Quiet, number)
                };
            }
            ib::ibv_ack_cq_events(queue, 1);
            taken += 1;
        }
    }
}
