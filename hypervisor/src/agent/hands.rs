//! What an agent does on its own host: it finds the roles that run, starts new ones, and has them told and ended.
//!
//! **A role outlives its agent.** It is a process of a session of its own, which waits for nobody. Its control socket in the run directory says how it
//! is; and its standard input is a lock file there, which is its own until it ends, however it ends: so an agent that comes anew knows of
//! every process that the one before it has started, even of one that has not come to its socket yet, and never starts it twice.
//!
//! ```text
//!   RUN-DIRECTORY/agent.lock        one agent to a run directory
//!   RUN-DIRECTORY/NAME.0.lock       a role's process of machine NAME, and NAME.1.lock, another one
//!   RUN-DIRECTORY/NAME.PID.sock     a role's control socket (control/place.rs)
//! ```
//! Unsafe: `setsid` between fork and exec, which the standard library does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::config::AgentConfig;
use super::disks::{self, DiskSpec, ImageReport};
use super::images::{ImageError, Images};
use super::placement::Unfit;
use super::plan::{Ended, Start};
use super::record::{Host, RoleReport, Site, Vm};
use crate::backends::tap::{Tap, TapConfig, TapError};
use crate::control::find;
use crate::control::wire::Ask;
use crate::protocol::Cold;
use crate::session::host::MTU;

/// Roles of one machine on one host.
const ROLES: usize = 2;

/// How many of the last bytes of a role's messages are looked at for its last words.
const LAST_WORDS: u64 = 2048;

/// Why something was not done here.
#[derive(Debug, thiserror::Error)]
pub enum HandsError {
    /// A file or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A guest's file that is none, or lies elsewhere.
    #[error("{}: {why}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A guest that needs a network.
    #[error("this agent has no bridge for guests (`bridge` in its configuration)")]
    NoBridge,
    /// The guest's cable.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The image of its disk.
    #[error("the image of its disk: {0}")]
    Disk(#[from] ImageError),
    /// What this host has of its disk is not what it is to start with.
    #[error("this host cannot start it: {0}")]
    Unfit(Unfit),
    /// Nobody says how large its disk is.
    #[error("the host that serves it does not tell of an image of its disk")]
    NoSize,
    /// Both locks of the machine are taken.
    #[error("its processes are here already")]
    Held,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> HandsError {
    let what = what.into();
    move |source| HandsError::Io { what, source }
}

/// A role that this agent started and has not seen the end of.
#[derive(Debug)]
struct Started {
    child: Child,
    number: u64,
}

/// The host.
#[derive(Debug)]
pub struct Hands {
    config: AgentConfig,
    /// This program, as it was found when the agent started: after an upgrade the new one lies there.
    program: PathBuf,
    started: Vec<(String, Started)>,
    ended: BTreeMap<String, Ended>,
    told: BTreeSet<(u32, SocketAddr)>,
    images: Images,
    /// Held for as long as the agent runs.
    _lock: File,
}

impl Hands {
    /// Takes the run directory.
    ///
    /// # Errors
    /// If it cannot be made, or another agent has it.
    pub fn new(config: &AgentConfig) -> Result<Self, HandsError> {
        for directory in [Some(&config.run_dir), config.log_dir.as_ref()]
            .into_iter()
            .flatten()
        {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(failed(format!("make {}", directory.display())))?;
        }
        let lock = lock_file(&config.run_dir.join("agent.lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let source = io::Error::other("another agent has this run directory");
                return Err(failed("start a second agent")(source));
            }
            Err(TryLockError::Error(source)) => {
                return Err(failed("lock the run directory")(source));
            }
        }
        let program = std::env::current_exe().map_err(failed("find this program's own file"))?;
        Ok(Self {
            config: config.clone(),
            program,
            started: Vec::new(),
            ended: BTreeMap::new(),
            told: BTreeSet::new(),
            images: Images::new(&config.disks),
            _lock: lock,
        })
    }

    /// Which installation this is.
    ///
    /// # Errors
    /// If it can be neither read nor written.
    pub fn instance(&self) -> Result<String, HandsError> {
        let path = self.config.run_dir.join("agent.id");
        let what = || format!("read {}", path.display());
        match fs::read_to_string(&path) {
            Ok(id) if id.len() == 32 => return Ok(id),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(what())(error)),
        }
        let id = crate::arbiter::random_identity().map_err(failed("draw an identity"))?;
        fs::write(&path, id.to_string()).map_err(failed(what()))?;
        Ok(id.to_string())
    }

    /// The roles that run here, and those that are over since the last look.
    ///
    /// # Errors
    /// If the run directory cannot be read.
    pub fn look(&mut self) -> Result<Vec<RoleReport>, crate::control::ControlError> {
        let found = find::roles(&self.config.run_dir, None)?;
        let mut at = 0;
        while at < self.started.len() {
            let (machine, started) = &mut self.started[at];
            let Ok(Some(status)) = started.child.try_wait() else {
                at += 1;
                continue;
            };
            let (machine, number) = (machine.clone(), started.number);
            self.started.swap_remove(at);
            let why = match self.last_words(&machine) {
                Some(words) => format!("{status}: {words}"),
                None => status.to_string(),
            };
            tracing::info!("a role of machine {machine} is over, {why}");
            self.ended.insert(machine, Ended { number, why });
        }
        let pids: BTreeSet<u32> = found.iter().map(|found| found.pid).collect();
        self.told.retain(|(pid, _)| pids.contains(pid));
        Ok(found.iter().map(RoleReport::of).collect())
    }

    /// What a role said last, if its messages are kept here.
    fn last_words(&self, machine: &str) -> Option<String> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = File::open(self.log_of(machine)?).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))
            .ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let last = text.lines().rev().find(|line| !line.trim().is_empty())?;
        let last = last.strip_prefix("doppel: ").unwrap_or(last);
        Some(last.chars().filter(|c| !c.is_control()).take(300).collect())
    }

    fn log_of(&self, machine: &str) -> Option<PathBuf> {
        let directory = self.config.log_dir.as_ref()?;
        Some(directory.join(format!("{machine}.log")))
    }

    /// Roles that are over, by machine.
    #[must_use]
    pub fn ended(&self) -> &BTreeMap<String, Ended> {
        &self.ended
    }

    /// What serving processes were told.
    #[must_use]
    pub fn told(&self) -> &BTreeSet<(u32, SocketAddr)> {
        &self.told
    }

    /// Processes here of each of these machines, by their locks.
    #[must_use]
    pub fn held<'a>(&self, machines: impl Iterator<Item = &'a String>) -> BTreeMap<String, usize> {
        let count = |machine: &str| {
            (0..ROLES)
                .filter(|slot| {
                    let path = self.lock_path(machine, *slot);
                    File::open(path).is_ok_and(|file| file.try_lock_shared().is_err())
                })
                .count()
        };
        machines
            .map(|machine| (machine.clone(), count(machine)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    fn lock_path(&self, machine: &str, slot: usize) -> PathBuf {
        self.config.run_dir.join(format!("{machine}.{slot}.lock"))
    }

    /// Images of machines' disks here.
    #[must_use]
    pub fn images(&self) -> Vec<ImageReport> {
        self.images.look()
    }

    /// Removes the image of a machine that was deleted. False: not yet.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove_image(&mut self, machine: &str, instance: &str) -> Result<bool, HandsError> {
        Ok(self.images.remove(machine, instance)?)
    }

    /// Starts a role of this machine. None: not yet, its disk is being made; this is to be asked again.
    ///
    /// # Errors
    /// See [`HandsError`]. Remembered besides as the end of this assignment.
    pub fn start(
        &mut self,
        site: &Site,
        me: &Host,
        vm: &Vm,
        what: Start,
        number: u64,
    ) -> Result<Option<u32>, HandsError> {
        let outcome = self.try_start(site, me, vm, what, number);
        if let Err(error) = &outcome {
            let why = error.to_string();
            self.ended.insert(vm.name.clone(), Ended { number, why });
        }
        outcome
    }

    fn try_start(
        &mut self,
        site: &Site,
        me: &Host,
        vm: &Vm,
        what: Start,
        number: u64,
    ) -> Result<Option<u32>, HandsError> {
        let lock = self.free_lock(&vm.name)?;
        let Some(disk) = self.words_of_disk(site, me, vm, what)? else {
            return Ok(None);
        };
        let mut words = match what {
            Start::Primary { cold } => {
                for file in vm.spec.files() {
                    self.check_image(&file)?;
                }
                let mut words = vec!["primary".to_owned(), "--alone".to_owned()];
                words.extend(cold_words(cold));
                words.extend(vm.spec.words_of_primary());
                words
            }
            Start::Backup => {
                let listen = me.place(vm.port).to_string();
                vec!["backup".to_owned(), "--listen".to_owned(), listen]
            }
        };
        words.extend(vm.spec.words_of_both());
        words.extend(disk);
        words.extend(self.words_of_host(site, me, vm));
        let cable = vm.spec.network.then(|| self.cable(vm)).transpose()?;
        if let Some(cable) = &cable {
            words.extend(["--net-fd".to_owned(), cable.as_raw_fd().to_string()]);
            let [high, low] = vm.port.to_be_bytes();
            // Locally administered, and the site's own by its port.
            let mac = format!("02:d0:99:e2:{high:02x}:{low:02x}");
            words.extend(["--mac".to_owned(), mac]);
        }
        let mut command = Command::new(&self.program);
        command.args(&words).current_dir("/").stdin(lock);
        // What a role says goes to standard error. The other one is its guest's console, which has no bound, and is to be looked at otherwise.
        command.stdout(Stdio::null());
        if let Some(path) = self.log_of(&vm.name) {
            let log = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path);
            let what = format!("write {}", path.display());
            command.stderr(log.map_err(failed(what))?);
        }
        // SAFETY: setsid is async-signal-safe, takes no memory, and fails only for a leader of a group, which a child that was just forked
        // is not.
        unsafe {
            command.pre_exec(|| match libc::setsid() {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let child = command.spawn().map_err(failed("start a role"))?;
        let pid = child.id();
        self.ended.remove(&vm.name);
        self.started
            .push((vm.name.clone(), Started { child, number }));
        Ok(Some(pid))
    }

    /// A lock that no process of the machine has.
    fn free_lock(&self, machine: &str) -> Result<File, HandsError> {
        for slot in 0..ROLES {
            let file = lock_file(&self.lock_path(machine, slot))?;
            if file.try_lock().is_ok() {
                return Ok(file);
            }
        }
        Err(HandsError::Held)
    }

    /// The option that names the machine's disk here, if it has one. None: its image is being made.
    fn words_of_disk(
        &mut self,
        site: &Site,
        me: &Host,
        vm: &Vm,
        what: Start,
    ) -> Result<Option<Vec<String>>, HandsError> {
        let image = match (&vm.spec.disk, what) {
            (None, _) => return Ok(Some(Vec::new())),
            (Some(DiskSpec::ReadOnly { file }), _) => {
                self.check_image(file)?;
                format!("{},read-only", file.display())
            }
            (Some(disk), Start::Primary { .. }) => match self.image_to_lead(site, me, vm, disk)? {
                Some(image) => image.display().to_string(),
                None => return Ok(None),
            },
            (Some(_), Start::Backup) => {
                let (primary, _) = site.serving(&vm.name).ok_or(HandsError::NoSize)?;
                let mut theirs =
                    disks::images(site, vm).filter(|(host, _)| host.name == primary.name);
                let (_, theirs) = theirs.next().ok_or(HandsError::NoSize)?;
                let image = self.images.to_follow(vm, theirs.bytes)?;
                image.display().to_string()
            }
        };
        Ok(Some(vec!["--disk".to_owned(), image]))
    }

    /// The image with which a primary is to start here.
    fn image_to_lead(
        &mut self,
        site: &Site,
        me: &Host,
        vm: &Vm,
        disk: &DiskSpec,
    ) -> Result<Option<PathBuf>, HandsError> {
        // What there was when it was placed here may have changed.
        if let Some(unfit) = disks::unfit(site, vm, me, true) {
            return Err(HandsError::Unfit(unfit));
        }
        let Some(image) = self.images.of(vm)? else {
            if let Some(file) = disk.file() {
                self.check_image(file)?;
            }
            return Ok(self.images.make(vm, disk)?);
        };
        if vm.disk.as_ref().is_some_and(|life| life.of.is_some()) {
            self.images.unmark(&image)?;
        }
        Ok(Some(image))
    }

    /// What is the host's: addresses, directories, the arbiter.
    fn words_of_host(&self, site: &Site, me: &Host, vm: &Vm) -> Vec<String> {
        let config = &self.config;
        let mut words = vec!["--name".to_owned(), vm.name.clone()];
        words.extend(["--instance".to_owned(), vm.instance.clone()]);
        let mut say = |option: &str, value: String| words.extend([option.to_owned(), value]);
        if let Some(roles) = &config.roles {
            say("--config", roles.display().to_string());
        }
        say("--arbiter", config.etcd.to_string());
        say("--secret", config.secret.display().to_string());
        say("--run-dir", config.run_dir.display().to_string());
        say("--heartbeat", SocketAddr::new(me.address, 0).to_string());
        let mut places = 0;
        for host in site.hosts.values().map(|host| &host.value) {
            let apart = host.name != me.name || vm.spec.same_host;
            if apart && host.ports.has(vm.port) {
                say("--standby", host.place(vm.port).to_string());
                places += 1;
            }
        }
        if places == 0 {
            // A role that knows of no place at all looks for none, even if it is told of one later. Nobody listens here.
            say("--standby", me.place(vm.port).to_string());
        }
        words
    }

    /// A cable from the guest to the bridge: it lives as long as whoever has its descriptor.
    fn cable(&self, vm: &Vm) -> Result<OwnedFd, HandsError> {
        let bridge = self.config.bridge.as_ref().ok_or(HandsError::NoBridge)?;
        let open = |name: String| {
            Tap::open(&TapConfig {
                name,
                address: None,
                mtu: MTU,
            })
        };
        // Two where both sides are on this host.
        let tap = match open(format!("dpl{}", vm.port)) {
            Err(TapError::Busy { .. }) => open(format!("dpl{}b", vm.port)),
            other => other,
        }?;
        tap.join_bridge(bridge, MTU)?;
        tap.into_port()
            .inheritable()
            .map_err(failed("share the guest's cable"))
    }

    /// A guest's file lies where the administrator of this host has put such files, and is no other machine's disk.
    fn check_image(&self, file: &Path) -> Result<(), HandsError> {
        let wrong = |why: String| HandsError::Image {
            path: file.to_owned(),
            why,
        };
        let images = &self.config.images;
        let real = fs::canonicalize(file).map_err(|error| wrong(error.to_string()))?;
        let below =
            fs::canonicalize(images).is_ok_and(|images| real.starts_with(images) && real.is_file());
        if !below {
            let images = images.display();
            return Err(wrong(format!(
                "it is no file below {images} (`images` in the agent's configuration)"
            )));
        }
        if fs::canonicalize(&self.config.disks).is_ok_and(|disks| real.starts_with(disks)) {
            return Err(wrong("it is the disk of a machine".to_owned()));
        }
        Ok(())
    }

    /// Gives an order to a role here: its number.
    ///
    /// # Errors
    /// Why it does not take it.
    pub fn order(&self, machine: &str, pid: u32, what: Ask) -> io::Result<u64> {
        find::order(&self.config.run_dir, machine, pid, what)
    }

    /// How a role here is.
    ///
    /// # Errors
    /// What the kernel says; see [`find::ask_process`].
    pub fn ask(&self, machine: &str, pid: u32) -> io::Result<crate::control::status::Status> {
        find::ask_process(&self.config.run_dir, machine, pid)
    }

    /// Tells a process that serves where a backup may listen.
    ///
    /// # Errors
    /// Why it does not take it.
    pub fn tell(&mut self, machine: &str, pid: u32, place: SocketAddr) -> io::Result<()> {
        self.order(machine, pid, Ask::Standby(place))?;
        self.told.insert((pid, place));
        Ok(())
    }
}

/// The word by which a primary is started although its record says that it may run.
fn cold_words(cold: Cold) -> Option<String> {
    match cold {
        Cold::No => None,
        Cold::Whatever => Some("--cold-start".to_owned()),
        Cold::From(reign) => Some(format!("--cold-start={reign}")),
    }
}

/// A file for a lock.
fn lock_file(path: &Path) -> Result<File, HandsError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed(format!("open {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::control::Operator;
    use crate::control::status::{Role, Standing};

    fn hands(directory: &Path) -> Hands {
        let path = directory.join("agent.toml");
        let text = format!(
            "name = \"a\"\netcd = \"etcd://10.0.0.9\"\nsecret = \"/secret\"\naddress = \"10.0.0.1\"\nmemory_mib = 1024\nrun_dir = \"{}\"\n",
            directory.join("run").display()
        );
        fs::write(&path, text).unwrap();
        Hands::new(&AgentConfig::read(&path).unwrap()).unwrap()
    }

    /// It had one when it was last looked at. This very process is the role, and would be no more.
    #[test]
    fn a_primary_without_a_backup_is_not_ended() {
        let directory = tempfile::tempdir().unwrap();
        let hands = hands(directory.path());
        let mut config = Config {
            name: "kv".into(),
            run_dir: Some(directory.path().join("run")),
            ..Config::default()
        };
        config.sandbox.enabled = false;
        let operator = Operator::start(&config, Role::Primary, false).unwrap();
        for standing in [
            Standing::Starting,
            Standing::Unprotected,
            Standing::Joining,
            Standing::Deciding,
        ] {
            operator.board().stands_as(standing);
            let refused = hands.order("kv", std::process::id(), Ask::Fail);
            assert!(refused.is_err(), "{standing:?}: {refused:?}");
        }
        drop(operator);
        assert!(hands.order("kv", std::process::id(), Ask::Fail).is_err());
    }
}
