//! The control connection: every message that one side waits for, from a peer that has proved itself and says anything.
#![forbid(unsafe_code)]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use hypervisor::config::Transport;
use hypervisor::handshake::{self, Hello, Ours, Stream, Trust};
use hypervisor::intervals::Replication;
use hypervisor::kvm::CpuModel;
use hypervisor::protocol::Identity;

use super::log_file::small_spec;
use super::source::Source;
use super::{Target, proof};

pub(super) const TARGET: Target = Target {
    name: "handshake",
    line: "messages of the handshake and answers after it, framed or not: understood, or refused in words",
    run,
    seeds,
};

const NAME: &str = "machine";

fn cpu() -> CpuModel {
    CpuModel {
        vendor: "Fuzz".into(),
        signature: 1,
    }
}

fn me() -> Identity {
    Identity::from_bytes([1; 16])
}

/// A byte chooses who listens, another whether each piece is framed; then pieces: length, bytes.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let (who, framed) = (source.u8() % 7, source.u8() & 1 == 0);
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    // All that is said fits the socket's buffer, and then the peer is gone: nobody waits.
    let mut said = proof::claim_of_this_user();
    while !source.is_over() && said.len() < 64 << 10 {
        let length = usize::from(source.u16());
        let piece = source.bytes(length);
        if framed {
            said.extend_from_slice(&(piece.len() as u32).to_le_bytes());
        }
        said.extend_from_slice(piece);
    }
    theirs.write_all(&said).expect("room in the socket");
    theirs.shutdown(Shutdown::Write).expect("an open socket");
    let channel =
        handshake::admit(Stream::Unix(ours), &Trust::same_user()).expect("a process of ours");
    let error = match who {
        0 => match handshake::listen_to(&channel, &this_backup(&cpu())) {
            Ok((hello, spec)) => {
                assert_eq!(hello.name, NAME);
                let _ = handshake::identity_of(&hello);
                let image = hypervisor::boot::Image::parse(&spec.guest, spec.image.to_vec());
                image.err().map(|error| error.to_string())
            }
            Err(error) => {
                handshake::refuse(&channel, &error);
                Some(error.to_string())
            }
        },
        1 => {
            let heartbeat = ([127, 0, 0, 1], 9).into();
            let welcomed = handshake::welcome(&channel, me(), heartbeat);
            welcomed.err().map(|error| error.to_string())
        }
        2 => {
            let hello = hello(0);
            let introduced = handshake::introduce(&channel, &hello, &[]);
            introduced.err().map(|error| error.to_string())
        }
        3 => handshake::await_ready(&channel)
            .err()
            .map(|error| error.to_string()),
        4 => {
            let record = handshake::hear_record(&channel, me());
            record.err().map(|error| error.to_string())
        }
        5 => {
            let exits = handshake::ask_exits(&channel);
            exits.err().map(|error| error.to_string())
        }
        _ => handshake::open_ring(&channel)
            .err()
            .map(|error| error.to_string()),
    };
    assert!(error.is_none_or(|words| !words.is_empty()));
}

fn this_backup(cpu: &CpuModel) -> Ours<'_> {
    Ours {
        cpu,
        name: NAME,
        instance: None,
        transport: Transport::Shm,
        replication: Replication::Replay,
    }
}

fn hello(spec_bytes: usize) -> Hello {
    Hello {
        version: handshake::VERSION,
        cpu: cpu(),
        told: Default::default(),
        name: NAME.into(),
        instance: None,
        transport: "shm".into(),
        replication: "replay".into(),
        identity: me().to_string(),
        heartbeat: ([127, 0, 0, 1], 9).into(),
        key: [7; 16],
        disk: None,
        running: false,
        sure_of_disks: true,
        spec_bytes: spec_bytes as u32,
    }
}

fn piece(seed: &mut Vec<u8>, bytes: &[u8]) {
    seed.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    seed.extend_from_slice(bytes);
}

fn seeds() -> Vec<Vec<u8>> {
    let spec = small_spec();
    let spec = spec.encode();
    let hello = serde_json::to_vec(&hello(spec.len())).expect("plain fields");
    // Not framed by the target, as the description has no length before it.
    let mut seed = vec![0, 1];
    let mut message = (hello.len() as u32).to_le_bytes().to_vec();
    message.extend(&hello);
    message.extend(&spec);
    piece(&mut seed, &message);
    let id = me().to_string();
    let mut seeds = vec![seed];
    for (who, text) in [
        (1, "{\"has_port\":false}".into()),
        (
            4,
            format!("{{\"epoch\":1,\"configuration\":1,\"owner\":\"{id}\",\"entitled\":\"{id}\"}}"),
        ),
        (
            2,
            format!("{{\"Welcome\":{{\"identity\":\"{id}\",\"heartbeat\":\"127.0.0.1:9\"}}}}"),
        ),
        (2, "{\"Refusal\":{\"why\":\"no\"}}".into()),
    ] {
        let mut seed = vec![who, 0];
        piece(&mut seed, text.as_bytes());
        seeds.push(seed);
    }
    seeds.push(vec![3, 1, 1, 0, b'r']);
    let mut exits = vec![5, 1];
    let mut answer = 2u32.to_le_bytes().to_vec();
    answer.extend([0; 2 * hypervisor::digest::ExitRecord::SIZE]);
    piece(&mut exits, &answer);
    seeds.push(exits);
    seeds
}
