//! A real Prometheus on loopback of the calling thread's network, and its `promtool`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What must happen on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What is said when one is missing.
const MISSING: &str = "run scripts/install-test-tools first (Debian's package prometheus)";

/// One Prometheus; killed when dropped.
#[derive(Debug)]
pub struct Prometheus {
    address: SocketAddr,
    log: PathBuf,
    child: Child,
}

impl Prometheus {
    /// Starts one with this configuration and its data in `directory`, and waits until it is ready.
    ///
    /// # Errors
    /// If it is not installed or does not come up.
    pub fn start(config: &Path, directory: &Path) -> Result<Self> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
        let address = free.local_addr().context("read a port")?;
        drop(free);
        let log = directory.join("prometheus.log");
        let to = || File::options().create(true).append(true).open(&log);
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .stdout(to().context("make a log")?)
            .stderr(to().context("make a log")?)
            .spawn()
            .with_context(|| format!("start prometheus: {MISSING}"))?;
        let mut prometheus = Self {
            address,
            log,
            child,
        };
        let until = Instant::now() + PATIENCE;
        while prometheus.get("/-/ready").is_err() {
            if let Ok(Some(status)) = prometheus.child.try_wait() {
                bail!("prometheus ended by {status}: {}", prometheus.said());
            }
            ensure!(
                Instant::now() < until,
                "prometheus is not ready: {}",
                prometheus.said()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(prometheus)
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address).context("connect to prometheus")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: prometheus\r\n\r\n")?;
        let mut text = String::new();
        stream
            .read_to_string(&mut text)
            .context("read prometheus's answer")?;
        let (head, body) = text.split_once("\r\n\r\n").context("no HTTP")?;
        let line = head.lines().next().unwrap_or_default();
        ensure!(line.contains(" 200 "), "{path}: {line}: {body}");
        Ok(body.to_owned())
    }

    /// Asks its API: what stands under `data`.
    ///
    /// # Errors
    /// If it does not answer with success.
    pub fn api(&self, path: &str) -> Result<Value> {
        let body = self.get(&format!("/api/v1/{path}"))?;
        let mut answer: Value = serde_json::from_str(&body).context("read prometheus's answer")?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].take())
    }

    /// What an expression comes to now: its series.
    ///
    /// # Errors
    /// If it is none.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let encoded: String = expression
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
                _ => format!("%{byte:02X}"),
            })
            .collect();
        let found = self.api(&format!("query?query={encoded}"))?;
        Ok(found["result"].as_array().cloned().unwrap_or_default())
    }

    /// The names of alerts that fire for this machine.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn firing(&self, machine: &str) -> Result<Vec<String>> {
        let found = self.api("alerts")?;
        let alerts = found["alerts"]
            .as_array()
            .context("prometheus tells no alerts")?;
        Ok(alerts
            .iter()
            .filter(|alert| alert["state"] == "firing" && alert["labels"]["name"] == machine)
            .filter_map(|alert| Some(alert["labels"]["alertname"].as_str()?.to_owned()))
            .collect())
    }

    /// Waits until this holds.
    ///
    /// # Errors
    /// If it does not in time, or cannot be asked.
    pub fn until(
        &self,
        what: &str,
        mut holds: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<Duration> {
        let begun = Instant::now();
        while !holds(self)? {
            ensure!(
                begun.elapsed() < PATIENCE,
                "{what} not within {PATIENCE:?}: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(begun.elapsed())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `promtool` with these words in `directory`.
///
/// # Errors
/// What it complains about.
pub fn promtool(directory: &Path, words: &[&str]) -> Result<()> {
    let output = Command::new("promtool")
        .args(words)
        .current_dir(directory)
        .output()
        .with_context(|| format!("start promtool: {MISSING}"))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "promtool {}: {}{}",
        words.join(" "),
        said(&output.stdout),
        said(&output.stderr)
    );
    Ok(())
}
