//! Plugging a client into a network.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};

use super::{Lab, NETWORKS, Reply, reply};

impl Lab {
    pub(super) fn plug(
        &self,
        network: u8,
        shown: Option<&str>,
        mut stream: UnixStream,
    ) -> Result<()> {
        match self.try_plug(network, shown, &stream) {
            Ok(()) => Ok(()),
            Err(error) => reply(&mut stream, &Reply::Refused(format!("{error:#}"))),
        }
    }

    fn try_plug(&self, network: u8, shown: Option<&str>, stream: &UnixStream) -> Result<()> {
        ensure!(
            network < NETWORKS,
            "there is no network {network}: they are 0 to {}",
            NETWORKS - 1
        );
        let shown = shown
            .map(|name| Ok::<_, anyhow::Error>(self.host(name)?.spec.number))
            .transpose()?;
        let mut first = serde_json::to_vec(&Reply::Done).context("write an answer")?;
        first.push(b'\n');
        let stream = stream.try_clone().context("share the socket")?;
        self.cables.plug(network, shown, stream, &first)
    }
}
