//! Queue pairs: making, connecting, posting, polling.

use std::mem::{MaybeUninit, zeroed};
use std::ptr::null_mut;

use rdma_log::verbs::abi::{
    self, BATCH, BELL, Completion, Failure, INLINE, Limits, Path, RUNG, Request, SIGNALLED, Step,
    WRITTEN,
};
use rdma_sys as ib;

use crate::device::Device;
use crate::{check, errno, said};

/// Sizes of inline data that are tried: devices refuse more than they have, and say in no portable way how much that is.
const INLINE_TRIES: [u32; 4] = [256, 128, 64, 0];
/// A receiver without a receive lets the sender wait so long: 0.64 ms, by the specification's table.
const RNR_TIMER: u8 = 12;
/// As often as this a sender tries that meets no receive: 7 is for ever, so fewer.
const RNR_RETRIES: u8 = 6;
/// Completions taken at once.
const POLLED: usize = 32;

struct Queue {
    device: *const Device,
    completions: *mut ib::ibv_cq,
    pair: *mut ib::ibv_qp,
}

pub(crate) unsafe extern "C" fn create(
    device: *mut abi::Device,
    limits: *mut Limits,
    queue: *mut *mut abi::Queue,
) -> Failure {
    // SAFETY: an open device, and the caller's live struct.
    let (device, limits) = unsafe { (&*device.cast::<Device>(), &mut *limits) };
    said(make(device, limits).map(|made| {
        // SAFETY: the caller's live place.
        unsafe { queue.write(Box::into_raw(Box::new(made)).cast()) };
    }))
}

fn make(device: &Device, limits: &mut Limits) -> Result<Queue, Failure> {
    let entries = limits.requests.saturating_add(limits.receives);
    let entries = i32::try_from(entries).map_err(|_| Failure::of(Step::CompletionQueue, 0))?;
    // SAFETY: an open device and its channel.
    let completions =
        unsafe { ib::ibv_create_cq(device.context, entries, null_mut(), device.channel, 0) };
    if completions.is_null() {
        return Err(Failure::of(Step::CompletionQueue, errno()));
    }
    let mut number = 0;
    for inline in INLINE_TRIES.into_iter().filter(|n| *n <= limits.inline) {
        // SAFETY: of integers and pointers that may be null; zero is a value.
        let mut wanted: ib::ibv_qp_init_attr = unsafe { zeroed() };
        wanted.send_cq = completions;
        wanted.recv_cq = completions;
        wanted.qp_type = ib::ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = limits.requests;
        wanted.cap.max_recv_wr = limits.receives;
        wanted.cap.max_send_sge = 1;
        wanted.cap.max_recv_sge = 1;
        wanted.cap.max_inline_data = inline;
        // SAFETY: a live protection domain and a live struct.
        let pair = unsafe { ib::ibv_create_qp(device.domain, &mut wanted) };
        if pair.is_null() {
            number = errno();
            continue;
        }
        // No more than asked for is used, whatever the device has: the accounting is by these numbers.
        limits.inline = wanted.cap.max_inline_data.min(limits.inline);
        // SAFETY: a live queue pair.
        limits.number = unsafe { (*pair).qp_num };
        return Ok(Queue {
            device,
            completions,
            pair,
        });
    }
    // SAFETY: made above, and no queue pair uses it.
    unsafe { ib::ibv_destroy_cq(completions) };
    Err(Failure::of(Step::QueuePair, number))
}

pub(crate) unsafe extern "C" fn connect(queue: *mut abi::Queue, path: *const Path) -> Failure {
    // SAFETY: a live queue pair, and the caller's live struct.
    let (queue, path) = unsafe { (&*queue.cast::<Queue>(), &*path) };
    said(bring_up(queue, path))
}

fn bring_up(queue: &Queue, path: &Path) -> Result<(), Failure> {
    use ib::ibv_qp_attr_mask as Mask;
    // SAFETY: the device outlives its queues.
    let port = unsafe { (*queue.device).port };
    let modify = |step, attributes: &mut ib::ibv_qp_attr, mask: ib::ibv_qp_attr_mask| {
        // SAFETY: a live queue pair and a live struct.
        check(step, unsafe {
            ib::ibv_modify_qp(queue.pair, attributes, mask.0 as i32)
        })
    };
    // SAFETY: of integers and arrays of them; zero is a value.
    let blank = || -> ib::ibv_qp_attr { unsafe { zeroed() } };

    let mut init = blank();
    init.qp_state = ib::ibv_qp_state::IBV_QPS_INIT;
    init.port_num = port.port;
    init.qp_access_flags = ib::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
    modify(
        Step::Init,
        &mut init,
        Mask::IBV_QP_STATE
            | Mask::IBV_QP_PKEY_INDEX
            | Mask::IBV_QP_PORT
            | Mask::IBV_QP_ACCESS_FLAGS,
    )?;

    let mut receive = blank();
    receive.qp_state = ib::ibv_qp_state::IBV_QPS_RTR;
    receive.path_mtu = path.mtu.into();
    receive.dest_qp_num = path.number;
    receive.rq_psn = path.psn;
    receive.max_dest_rd_atomic = 1;
    receive.min_rnr_timer = RNR_TIMER;
    receive.ah_attr.dlid = path.lid;
    receive.ah_attr.port_num = port.port;
    if port.ethernet == 1 {
        receive.ah_attr.is_global = 1;
        receive.ah_attr.grh.dgid = ib::ibv_gid { raw: path.gid };
        receive.ah_attr.grh.sgid_index = port.gid_index as u8;
        // 1 would end at the first router; RoCE v2 may be routed.
        receive.ah_attr.grh.hop_limit = 64;
    }
    modify(
        Step::Receive,
        &mut receive,
        Mask::IBV_QP_STATE
            | Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER,
    )?;

    let mut send = blank();
    send.qp_state = ib::ibv_qp_state::IBV_QPS_RTS;
    send.sq_psn = path.own_psn;
    send.timeout = path.timeout;
    send.retry_cnt = path.retries;
    send.rnr_retry = RNR_RETRIES;
    send.max_rd_atomic = 1;
    modify(
        Step::Send,
        &mut send,
        Mask::IBV_QP_STATE
            | Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC,
    )
}

pub(crate) unsafe extern "C" fn post(
    queue: *mut abi::Queue,
    requests: *const Request,
    count: u32,
) -> Failure {
    // SAFETY: a live queue pair; the caller's array has so many.
    let (queue, requests) = unsafe {
        let requests = std::slice::from_raw_parts(requests, count as usize);
        (&*queue.cast::<Queue>(), requests)
    };
    if requests.is_empty() || requests.len() > BATCH {
        return Failure::of(Step::Post, libc::EINVAL);
    }
    let mut pieces = [const { MaybeUninit::<ib::ibv_sge>::uninit() }; BATCH];
    let mut chain = [const { MaybeUninit::<ib::ibv_send_wr>::uninit() }; BATCH];
    // From the end, so that each can point to the next.
    let mut next = null_mut();
    for ((request, piece), work) in requests.iter().zip(&mut pieces).zip(&mut chain).rev() {
        let piece = piece.write(ib::ibv_sge {
            addr: request.local,
            length: request.len,
            lkey: request.local_key,
        });
        // SAFETY: of integers, unions of them and pointers that may be null; zero is a value.
        let work = work.write(unsafe { zeroed() });
        work.wr_id = request.id;
        work.next = next;
        work.sg_list = piece;
        work.num_sge = 1;
        work.opcode = if request.flags & BELL == 0 {
            ib::ibv_wr_opcode::IBV_WR_RDMA_WRITE
        } else {
            ib::ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM
        };
        if request.flags & SIGNALLED != 0 {
            work.send_flags |= ib::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        if request.flags & INLINE != 0 {
            work.send_flags |= ib::ibv_send_flags::IBV_SEND_INLINE.0;
        }
        work.wr.rdma.remote_addr = request.remote;
        work.wr.rdma.rkey = request.remote_key;
        next = work;
    }
    let mut bad = null_mut();
    // SAFETY: a live queue pair; the chain and what it points to live through the call.
    said(check(Step::Post, unsafe {
        ib::ibv_post_send(queue.pair, next, &mut bad)
    }))
}

pub(crate) unsafe extern "C" fn expect(queue: *mut abi::Queue, count: u32) -> Failure {
    // SAFETY: a live queue pair.
    let queue = unsafe { &*queue.cast::<Queue>() };
    for _ in 0..count {
        // SAFETY: of integers and pointers that may be null; zero is a value: a receive without memory.
        let mut work: ib::ibv_recv_wr = unsafe { zeroed() };
        let mut bad = null_mut();
        // SAFETY: a live queue pair and live structs.
        let rc = unsafe { ib::ibv_post_recv(queue.pair, &mut work, &mut bad) };
        if let Err(failure) = check(Step::Expect, rc) {
            return failure;
        }
    }
    Failure::NONE
}

pub(crate) unsafe extern "C" fn poll(
    queue: *mut abi::Queue,
    to: *mut Completion,
    most: u32,
    count: *mut u32,
) -> Failure {
    // SAFETY: a live queue pair.
    let queue = unsafe { &*queue.cast::<Queue>() };
    let mut found = [const { MaybeUninit::<ib::ibv_wc>::uninit() }; POLLED];
    let most = POLLED.min(most as usize);
    // SAFETY: a live completion queue; the array has so many places.
    let got = unsafe { ib::ibv_poll_cq(queue.completions, most as i32, found.as_mut_ptr().cast()) };
    let Ok(got) = usize::try_from(got) else {
        return Failure::of(Step::Poll, got.saturating_abs());
    };
    for (i, found) in found.iter().take(got).enumerate() {
        // SAFETY: the library has filled so many; the caller's array has as many places.
        unsafe {
            let found = found.assume_init_ref();
            let rung = found.opcode == ib::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM;
            to.add(i).write(Completion {
                id: found.wr_id,
                status: found.status,
                vendor: found.vendor_err,
                kind: if rung { RUNG } else { WRITTEN },
                reserved: 0,
            });
        }
    }
    // SAFETY: the caller's live integer.
    unsafe { count.write(got as u32) };
    Failure::NONE
}

pub(crate) unsafe extern "C" fn arm(queue: *mut abi::Queue) -> Failure {
    // SAFETY: a live queue.
    said(check(Step::Arm, unsafe {
        ib::ibv_req_notify_cq((*queue.cast::<Queue>()).completions, 0)
    }))
}

pub(crate) unsafe extern "C" fn destroy(queue: *mut abi::Queue) -> Failure {
    // SAFETY: made by `create`, given back until that succeeds. Its events are acknowledged as they come, so that the
    // completion queue's end waits for none.
    unsafe {
        let it = queue.cast::<Queue>();
        if let Err(failure) = check(Step::Destroy, ib::ibv_destroy_qp((*it).pair)) {
            return failure;
        }
        ib::ibv_destroy_cq((*it).completions);
        drop(Box::from_raw(it));
    }
    Failure::NONE
}
