//! A node's keeper: it starts the role that the node has, and looks after it until the machine or the job is over.
//!
//! ```text
//!                 ┌────────────── the role has ended, the machine has not: again, as a standby ───────────────┐
//!                 ▼                                                                                           │
//!   start ──▶ role runs ──SIGTERM──▶ ending: a primary is ordered off, a backup follows it, a standby leaves ─┤
//!                 │                                                                                           ▼
//!                 └── the arbiter says that the machine is off ─────────────────────────▶ over ──▶ the job's end, which is
//!                                                                                                 ours to make if the batch step is lost
//! ```
#![forbid(unsafe_code)]

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ask::{self, Job};
use super::child::Role;
use super::{Machine, Part, SlurmError, failed, run_dir};
use crate::arbiter::{self, Arbiter, ArbiterError};
use crate::backends::wait::Waiter;
use crate::control::find;
use crate::control::status::{self, Standing};
use crate::control::wire::Ask;
use crate::protocol::record::{Record, State};
use crate::session::host::stop_signals;

/// Between two looks at the role.
const LOOK: Duration = Duration::from_millis(200);

/// Between two looks at the arbiter: only a standby needs them, which nobody tells that the machine is off.
const LOOK_AT_ARBITER: Duration = Duration::from_secs(2);

/// Between two orders to turn the machine off: one that is under way is not to be given again.
const OFF_AGAIN: Duration = Duration::from_secs(3);

/// How long after SIGTERM a role may take. Slurm kills what is left after KillWait, 30 s if the site has not chosen another time.
const LEAVES_WITHIN: Duration = Duration::from_secs(20);

/// Before a role is started again: so long at first, twice as long each time, and at most [`AGAIN_MOST`]. One that ran for longer than that
/// is none that fails at once.
const AGAIN: Duration = Duration::from_secs(2);
const AGAIN_MOST: Duration = Duration::from_secs(60);

/// How long a machine may take to begin, before the nodes that wait for it give it up.
const BEGINS_WITHIN: Duration = Duration::from_secs(300);

/// Between two questions to Slurm, which has other jobs to answer for.
const LOOK_AT_JOB: Duration = Duration::from_secs(5);

/// The exit code of a guest that ended badly, of a role that was started wrongly, and of anything else.
const GUEST: u8 = 5;
const USAGE: u8 = 2;
const ERROR: u8 = 1;

/// How a node came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The machine is off.
    Over(u8),
    /// The node has left it, or it never ran.
    Left(u8),
}

impl End {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Over(code) | Self::Left(code) => code,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Over(code) => format!("over {code}\n"),
            Self::Left(code) => format!("left {code}\n"),
        }
    }

    /// Reads what a node has left; none if that is not there yet, or not whole.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let (word, code) = text.strip_suffix('\n')?.split_once(' ')?;
        let code = code.parse().ok()?;
        match word {
            "over" => Some(Self::Over(code)),
            "left" => Some(Self::Left(code)),
            _ => None,
        }
    }
}

/// What follows from a role's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Ends(End),
    /// Another role is started.
    Again,
}

/// A role has ended with this code (none: by a signal). `state` is the arbiter's, if it answered.
fn after(code: Option<u8>, first: bool, ending: bool, state: Option<Option<State>>) -> After {
    match state {
        Some(Some(State::Ended)) => {
            let code = code.filter(|code| *code == GUEST).unwrap_or(0);
            After::Ends(End::Over(code))
        }
        _ if ending => After::Ends(End::Left(0)),
        _ if code == Some(USAGE) => After::Ends(End::Left(USAGE)),
        // The first primary has not even begun: another one would not, either.
        Some(None) if first => {
            let code = code.filter(|code| *code != 0).unwrap_or(ERROR);
            After::Ends(End::Left(code))
        }
        _ => After::Again,
    }
}

/// What a role is told after SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// The machine's end, which its backup comes to by the log.
    PowerOff,
    /// To leave: nobody has anything of it.
    Leave,
    /// Nothing: its end comes by the log, or it goes live and is told then.
    Nothing,
}

fn word_for(role: status::Role, standing: Standing, since: Duration) -> Word {
    match (role, standing) {
        _ if since >= LEAVES_WITHIN => Word::Leave,
        (status::Role::Primary, Standing::Ended) => Word::Nothing,
        (status::Role::Primary, _) => Word::PowerOff,
        (_, Standing::Waiting) => Word::Leave,
        _ => Word::Nothing,
    }
}

/// Looks after the node of this number until its part in the job is over; the exit code.
///
/// # Errors
/// See [`SlurmError`].
pub fn keep(machine: &Machine, at: usize) -> Result<u8, SlurmError> {
    let signals = stop_signals()?;
    let job = super::launch::job_id()?;
    let me = &machine.nodes[at];
    tracing::info!(
        "node {}: {} of machine {} in job {job}, at {}",
        me.name,
        Machine::title(at),
        machine.name,
        me.place
    );
    let run_dir = std::env::temp_dir().join(format!("doppel-{job}-{}", me.name));
    run_dir::make(&run_dir)?;
    let mut keeper = Keeper {
        machine,
        at,
        program: std::env::current_exe().map_err(failed("find this program's own file"))?,
        arbiter: arbiter::open(&machine.arbiter, &machine.name)?,
        run_dir: run_dir.clone(),
        signals,
        waiter: Waiter::new(),
        role: None,
        first: true,
        begun: Instant::now(),
        started: Instant::now(),
        // Doubled before it is waited for.
        pause: AGAIN / 2,
        ending: None,
        ordered: None,
        asked: Instant::now(),
    };
    let kept = keeper.run();
    // It is this node's own, and nothing in it is of use to anybody when the role is over.
    let _ = fs::remove_dir_all(&run_dir);
    let end = kept?;
    let left = fs::write(machine.end_of(me), end.text());
    left.map_err(failed("write to the job's directory"))?;
    tracing::info!(
        "node {}: {}",
        me.name,
        match end {
            End::Over(_) => "the machine is off",
            End::Left(0) => "has left the machine",
            End::Left(_) => "gives up",
        }
    );
    if end != End::Left(0) {
        keeper.see_job_end(&job);
    }
    Ok(end.code())
}

struct Keeper<'a> {
    machine: &'a Machine,
    at: usize,
    program: PathBuf,
    arbiter: Box<dyn Arbiter>,
    run_dir: PathBuf,
    signals: UnixStream,
    waiter: Waiter,
    role: Option<Role>,
    /// Whether the role is the first one of this node.
    first: bool,
    begun: Instant,
    /// When the role was started last.
    started: Instant,
    pause: Duration,
    /// Since when the job is being ended.
    ending: Option<Instant>,
    /// When the role was ordered off last.
    ordered: Option<Instant>,
    /// When the arbiter was asked last.
    asked: Instant,
}

impl Keeper<'_> {
    fn run(&mut self) -> Result<End, SlurmError> {
        self.start(Machine::part(self.at))?;
        loop {
            if self.signalled(LOOK)? && self.ending.is_none() {
                tracing::info!("SIGTERM: the job is being ended, the machine is to be powered off");
                self.ending = Some(Instant::now());
            }
            let Some(role) = &mut self.role else {
                if self.ending.is_some() {
                    return Ok(End::Left(0));
                }
                if self.started.elapsed() >= self.pause {
                    self.start(Part::Backup)?;
                }
                continue;
            };
            let ended = role.ended().map_err(failed("look after a role"))?;
            if let Some(status) = ended {
                self.role = None;
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                let state = self.state();
                match after(
                    code,
                    self.first && self.at == 0,
                    self.ending.is_some(),
                    state,
                ) {
                    After::Ends(end) => return Ok(end),
                    After::Again => self.again(&status.to_string()),
                }
                continue;
            }
            match self.ending {
                Some(since) => self.press(since.elapsed()),
                None => self.watch(),
            }
        }
    }

    fn start(&mut self, part: Part) -> Result<(), SlurmError> {
        let words = self.machine.role(self.at, part, &self.run_dir);
        let role = Role::start(&self.program, &words).map_err(failed("start a role"))?;
        self.role = Some(role);
        self.started = Instant::now();
        self.ordered = None;
        Ok(())
    }

    fn again(&mut self, why: &str) {
        self.first = false;
        let ran = self.started.elapsed();
        self.pause = match ran >= AGAIN_MOST {
            true => AGAIN,
            false => (self.pause * 2).min(AGAIN_MOST),
        };
        self.started = Instant::now();
        tracing::warn!(
            "the role here has ended ({why}); the machine is not off: it is a standby again in {} s",
            self.pause.as_secs()
        );
    }

    /// What the arbiter says of the machine; none if it does not answer.
    fn state(&mut self) -> Option<Option<State>> {
        self.asked = Instant::now();
        let read: Result<Option<Record>, ArbiterError> = self.arbiter.read();
        match read {
            Ok(record) => Some(record.map(|record| record.state)),
            Err(error) => {
                tracing::warn!("{error}");
                None
            }
        }
    }

    /// A standby is told by nobody that the machine is off, or never began.
    fn watch(&mut self) {
        if self.asked.elapsed() < LOOK_AT_ARBITER || !self.waits() {
            return;
        }
        let why = match self.state() {
            Some(Some(State::Ended)) => "the machine is off",
            Some(None) if self.begun.elapsed() >= BEGINS_WITHIN => "the machine has never begun",
            _ => return,
        };
        tracing::info!("{why}: the standby here ends");
        self.ending = Some(Instant::now());
        self.leave();
    }

    fn status(&self) -> Option<status::Status> {
        let pid = self.role.as_ref()?.pid();
        find::ask_process(&self.run_dir, &self.machine.name, pid).ok()
    }

    fn waits(&self) -> bool {
        self.status()
            .is_some_and(|status| status.standing == Standing::Waiting)
    }

    /// Has the role come to its end.
    fn press(&mut self, since: Duration) {
        let Some(role) = &self.role else { return };
        let pid = role.pid();
        // One that does not answer is being set up or taken down, and is not waited for for ever.
        let word = match self.status() {
            Some(status) => word_for(status.role, status.standing, since),
            None if since >= LEAVES_WITHIN => Word::Leave,
            None => Word::Nothing,
        };
        match word {
            Word::Nothing => {}
            Word::Leave => self.leave(),
            Word::PowerOff => {
                if self.ordered.is_some_and(|at| at.elapsed() < OFF_AGAIN) {
                    return;
                }
                self.ordered = Some(Instant::now());
                match find::order(&self.run_dir, &self.machine.name, pid, Ask::PowerOff) {
                    Ok(_) => tracing::info!("the machine is ordered off"),
                    Err(error) => tracing::warn!("the machine is not ordered off: {error}"),
                }
            }
        }
    }

    fn leave(&mut self) {
        // Once in a while: a role that is ending needs no second one.
        if self.ordered.is_some_and(|at| at.elapsed() < OFF_AGAIN) {
            return;
        }
        self.ordered = Some(Instant::now());
        if let Some(Err(error)) = self.role.as_ref().map(Role::interrupt) {
            tracing::warn!("the role here cannot be ended: {error}");
        }
    }

    /// Waits at most so long for SIGTERM; whether it came.
    fn signalled(&mut self, longest: Duration) -> Result<bool, SlurmError> {
        self.waiter.clear();
        let signals = self.waiter.add(&self.signals, true, false);
        self.waiter
            .wait(Some(longest))
            .map_err(failed("wait for signals"))?;
        if !self.waiter.ready(signals).read {
            return Ok(false);
        }
        let mut bytes = [0; 16];
        // What was read is of no interest; that it was, is.
        let _ = (&self.signals).read(&mut bytes);
        Ok(true)
    }

    /// The batch step ends the job; where it is lost, the nodes do.
    fn see_job_end(&mut self, job: &str) {
        loop {
            match Job::of(job).and_then(|job| Ok((job.runs, job.lost_its_batch_step()?))) {
                Ok((true, true)) => {
                    tracing::info!(
                        "the batch step was lost with its node: this node ends job {job}"
                    );
                    if let Err(error) = ask::ask("scancel", &[job]) {
                        tracing::warn!("{error}");
                    }
                }
                Ok((true, false)) => {}
                Ok((false, _)) => return,
                Err(error) => tracing::warn!("{error}"),
            }
            if !matches!(self.signalled(LOOK_AT_JOB), Ok(false)) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: Option<Option<State>> = Some(Some(State::Live));
    const OFF: Option<Option<State>> = Some(Some(State::Ended));

    #[test]
    fn the_machine_s_end_is_the_node_s() {
        assert_eq!(after(Some(0), true, true, OFF), After::Ends(End::Over(0)));
        assert_eq!(after(Some(5), false, false, OFF), After::Ends(End::Over(5)));
        // A standby that was told to leave.
        assert_eq!(after(Some(1), false, true, OFF), After::Ends(End::Over(0)));
        assert_eq!(after(None, false, false, OFF), After::Ends(End::Over(0)));
    }

    #[test]
    fn a_role_that_ends_alone_is_a_standby_again() {
        for code in [Some(0), Some(1), Some(3), Some(4), None] {
            assert_eq!(after(code, false, false, LIVE), After::Again);
            assert_eq!(after(code, true, false, LIVE), After::Again);
            assert_eq!(after(code, true, false, None), After::Again);
        }
        assert_eq!(after(Some(3), false, true, LIVE), After::Ends(End::Left(0)));
    }

    #[test]
    fn what_cannot_begin_is_given_up() {
        assert_eq!(
            after(Some(2), false, false, LIVE),
            After::Ends(End::Left(2))
        );
        assert_eq!(
            after(Some(1), true, false, Some(None)),
            After::Ends(End::Left(1))
        );
        assert_eq!(
            after(None, true, false, Some(None)),
            After::Ends(End::Left(1))
        );
        // A backup may be there before its primary.
        assert_eq!(after(Some(1), false, false, Some(None)), After::Again);
    }

    #[test]
    fn at_the_job_s_end_who_serves_is_ordered_off_and_its_backup_follows() {
        use status::Role::{Backup, Primary};
        let soon = Duration::from_secs(1);
        for standing in [
            Standing::Protected,
            Standing::Unprotected,
            Standing::Joining,
        ] {
            assert_eq!(word_for(Primary, standing, soon), Word::PowerOff);
        }
        for standing in [Standing::Following, Standing::TakingOver] {
            assert_eq!(word_for(Backup, standing, soon), Word::Nothing);
        }
        assert_eq!(word_for(Backup, Standing::Waiting, soon), Word::Leave);
        assert_eq!(
            word_for(Backup, Standing::Following, LEAVES_WITHIN),
            Word::Leave
        );
    }

    #[test]
    fn an_end_reads_as_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.end");
        assert_eq!(End::read(&path), None);
        for end in [End::Over(0), End::Over(5), End::Left(2)] {
            fs::write(&path, end.text()).unwrap();
            assert_eq!(End::read(&path), Some(end));
        }
        for torn in ["", "over", "over 5", "over 500\n", "gone 1\n"] {
            fs::write(&path, torn).unwrap();
            assert_eq!(End::read(&path), None, "{torn:?}");
        }
    }
}
