//! A disk that hosts of the lab have in common and that keeps reservations: Linux's own SCSI target in one host, by iSCSI in the others.
//!
//! ```text
//!  h1: /dev/sda ── iscsi_tcp ──┐
//!                              ├── eth0 ── h3: iscsi_target_mod ── target_core_file ── a file
//!  h2: /dev/sda ── iscsi_tcp ──┘
//! ```
//! The target knows each host by its name, so that a registration outlives the connection by which it was made.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};

use super::{PATIENCE, address};
use crate::lab::{Host, Lab};

/// Where a host has it. No host of the lab has another.
pub const DEVICE: &str = "/dev/sda";

/// What names are made of.
const NAME: &str = "iqn.2026-01.lab";

/// The disk, and who has it.
#[derive(Debug)]
pub struct Storage<'a> {
    lab: &'a Lab,
    target: &'a str,
    bytes: u64,
}

impl<'a> Storage<'a> {
    /// Makes a disk of so many bytes, all zero, in the host `target`, for these hosts.
    ///
    /// # Errors
    /// What the host says.
    pub fn serve(lab: &'a Lab, target: &'a str, bytes: u64, hosts: &[&str]) -> Result<Self> {
        let portal = address(target);
        let mut line = format!(
            "set -e
# Where reservations are kept over a loss of power; the target looks for it when it begins.
mkdir -p /etc/target/pr
modprobe target_core_file
modprobe iscsi_target_mod
mount -t configfs configfs /sys/kernel/config
truncate -s {bytes} /disk
cd /sys/kernel/config/target
mkdir -p core/fileio_0/disk
echo fd_dev_name=/disk,fd_dev_size={bytes} >core/fileio_0/disk/control
echo 1 >core/fileio_0/disk/enable
echo doppel >core/fileio_0/disk/wwn/vpd_unit_serial
mkdir -p iscsi/{NAME}:disk/tpgt_1/lun/lun_0 iscsi/{NAME}:disk/tpgt_1/np/{portal}:3260
ln -s /sys/kernel/config/target/core/fileio_0/disk iscsi/{NAME}:disk/tpgt_1/lun/lun_0/disk
cd iscsi/{NAME}:disk/tpgt_1
echo 0 >attrib/authentication
"
        );
        for host in hosts {
            line += &format!(
                "mkdir acls/{NAME}:{host} acls/{NAME}:{host}/lun_0
ln -s $PWD/lun/lun_0 acls/{NAME}:{host}/lun_0/disk
"
            );
        }
        line += "echo 1 >enable";
        lab.host(target).sh(&line, PATIENCE)?;
        let storage = Self { lab, target, bytes };
        hosts.iter().try_for_each(|host| storage.reach(host))?;
        Ok(storage)
    }

    /// Gives the disk to a host that was just booted.
    ///
    /// # Errors
    /// If it does not see it.
    pub fn reach(&self, host: &str) -> Result<()> {
        let portal = address(self.target);
        let line = format!(
            "set -e
modprobe iscsi_tcp
modprobe sd_mod
iscsistart -i {NAME}:{host} -t {NAME}:disk -g 1 -a {portal} -p 3260
until [ -b {DEVICE} ]; do sleep 0.1; done"
        );
        let seen = self.lab.host(host).sh(&line, PATIENCE);
        seen.map(drop)
            .with_context(|| format!("{host} does not see the disk"))
    }

    /// Makes the disk as new, by a host to which it is free.
    ///
    /// # Errors
    /// If the disk takes nothing of it.
    pub fn wipe(&self, host: &str) -> Result<()> {
        let line = format!(
            "dd if=/dev/zero of={DEVICE} bs={} count=1 oflag=direct",
            self.bytes
        );
        self.lab.host(host).sh(&line, PATIENCE).map(drop)
    }

    /// How many requests of this host the disk has refused since it was booted, as its kernel tells.
    ///
    /// # Errors
    /// If the host does not answer.
    pub fn refusals_of(&self, host: &Host<'_>) -> Result<u64> {
        let told = host.sh("dmesg | grep -c 'reservation conflict' || true", PATIENCE)?;
        told.trim().parse().context("a count")
    }

    /// Writes zeros over the disk's first blocks from this host, past whoever runs there: whether the disk took them, and what was said.
    ///
    /// # Errors
    /// If the host does not answer, or cannot read the disk either: a reservation lets everybody read.
    pub fn takes_writes_of(&self, host: &Host<'_>) -> Result<(bool, String)> {
        let read = format!("dd if={DEVICE} of=/dev/null bs=4096 count=1 iflag=direct");
        host.sh(&read, PATIENCE)?;
        let write = format!("dd if=/dev/zero of={DEVICE} bs=4096 count=4 oflag=direct");
        let done = host.run(&["sh", "-c", &write], PATIENCE)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(done.code <= 1, "dd ended with {}: {said}", done.code);
        Ok((done.code == 0, said))
    }
}
