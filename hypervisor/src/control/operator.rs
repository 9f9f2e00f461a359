//! The operator's thread.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ControlError;
use super::board::{Board, Command};
use super::clients::{Clients, Kind, Reply, Socket};
use super::hook::{Change, Helper};
use super::place::{ControlSocket, default_run_dir};
use super::prometheus;
use super::status::{Role, Standing};
use super::view::{About, View};
use super::viewers::{self, Viewers};
use super::wire::{Answer, Ask, Outcome, Request};
use crate::backends::outflow;
use crate::backends::wait::Waiter;
use crate::config::Config;
use crate::entry::Control;
use crate::orders::Pace;
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::make_this_thread_patient;
use crate::session::report::{Event, Reporter};

/// Between two readings of the figures.
const SECOND: Duration = Duration::from_secs(1);

/// How often a machine that runs unprotected says so again: seldom enough to leave a log readable, often enough that whoever
/// looks into it sees it.
const NAG_EVERY: Duration = Duration::from_secs(60);

/// Whoever watches this role. Dropped, the role has ended: what there is to say is said first.
#[derive(Debug)]
pub struct Operator {
    board: Arc<Board>,
    thread: Option<JoinHandle<()>>,
}

impl Operator {
    /// Starts the thread and opens what it listens at. First of all in a role, before anything is open that a hook must not
    /// inherit.
    ///
    /// # Errors
    /// See [`ControlError`]. A default run directory that cannot be used is no error but a warning: the machine is worth more.
    pub fn start(config: &Config, role: Role, json: bool) -> Result<Self, ControlError> {
        let host = |what| move |source| ControlError::Host { what, source };
        let board = Board::new(&config.name, role).map_err(host("make an event descriptor"))?;
        let board = Arc::new(board);
        crate::journal::speak_of(&board);
        let sandbox = Sandbox::prepare(&config.sandbox)?;
        let own = sandbox.clone();
        let told = Arc::downgrade(&board);
        outflow::begin(
            move || own.confine(Thread::Outflow).expect(NOT_CONFINED),
            move |text| {
                if let Some(board) = told.upgrade() {
                    Reporter::new(json, board).say(&Event::Notice { text, loud: true });
                }
            },
        )
        .map_err(host("start the threads of standard output and error"))?;
        let helper = config.hook.as_deref().map(Helper::start).transpose();
        let helper = helper.map_err(ControlError::Hook)?;
        let metrics = config.metrics.map(|address| {
            let listen = || {
                let listener = TcpListener::bind(address.0)?;
                listener.set_nonblocking(true)?;
                let at = listener.local_addr()?;
                Ok((listener, at))
            };
            listen().map_err(|source| ControlError::Metrics {
                address: address.0,
                source,
            })
        });
        let (metrics, at) = metrics.transpose()?.unzip();
        let socket = control_socket(config)?;
        let pair = role != Role::Solo;
        let about = About {
            name: config.name.clone(),
            instance: config.instance.clone(),
            transport: pair.then(|| config.pair.transport.name().to_owned()),
            arbiter: pair.then(|| config.pair.arbiter.absolute().to_string()),
            metrics: at,
            hook: helper.is_some(),
        };
        let desk = Desk {
            board: Arc::clone(&board),
            view: View::new(about, role, Instant::now()),
            reporter: Reporter::new(json, Arc::clone(&board)),
            socket,
            metrics,
            helper,
            clients: Clients::default(),
            viewers: Viewers::default(),
        };
        let thread = std::thread::Builder::new()
            .name("operator".into())
            .spawn(move || {
                make_this_thread_patient();
                sandbox.confine(Thread::Operator).expect(NOT_CONFINED);
                desk.work();
            })
            .map_err(host("start the operator's thread"))?;
        Ok(Self {
            board,
            thread: Some(thread),
        })
    }

    /// Where the role leaves what it has to say.
    #[must_use]
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }

    /// The role is over, for this reason.
    pub fn end(self, why: &str) {
        self.board.said(why, false);
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.board.stands_as(Standing::Ended);
        self.board.end();
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was told; the role has ended all the same.
            let _ = thread.join();
        }
        outflow::settle();
    }
}

/// The socket, unless only the default place for it is not to be had.
fn control_socket(config: &Config) -> Result<Option<ControlSocket>, ControlError> {
    let directory: PathBuf = config.run_dir.clone().unwrap_or_else(default_run_dir);
    match ControlSocket::bind(&directory, &config.name, std::process::id()) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if config.run_dir.is_some() => Err(error),
        Err(error) => {
            tracing::warn!("doppel status and doppel top will not see this role: {error}");
            Ok(None)
        }
    }
}

/// What the thread has before it.
struct Desk {
    board: Arc<Board>,
    view: View,
    reporter: Reporter,
    socket: Option<ControlSocket>,
    metrics: Option<TcpListener>,
    helper: Option<Helper>,
    clients: Clients,
    viewers: Viewers,
}

impl Desk {
    fn work(mut self) {
        let mut waiter = Waiter::new();
        let mut second = Instant::now() + SECOND;
        let mut nag = NAG_EVERY;
        let mut admit_at = [Instant::now(); 2];
        loop {
            let now = Instant::now();
            // Looked at first: what was left before the end is picked up after it.
            let over = self.board.is_over();
            self.pick_up(now);
            if over {
                self.viewers.last_words(self.board.spool(), now);
                return;
            }
            if now >= second {
                second = now + SECOND;
                self.view.second();
                nag = self.nag(nag, now);
            }
            waiter.clear();
            let wake = waiter.add(self.board.wake(), true, false);
            let mut again = second;
            let mut may_come = |from: Instant| {
                if now < from {
                    again = again.min(from);
                }
                now >= from
            };
            let control = match &self.socket {
                Some(socket) if may_come(admit_at[0]) => Some(waiter.add(socket, true, false)),
                _ => None,
            };
            let scrape = match &self.metrics {
                Some(listener) if may_come(admit_at[1]) => Some(waiter.add(listener, true, false)),
                _ => None,
            };
            let helper = self
                .helper
                .as_ref()
                .map(|helper| waiter.add(helper, true, false));
            if let Some(next) = self.clients.wait(&mut waiter, now) {
                again = again.min(next);
            }
            let stage = self.board.stage();
            let (spool, stage) = (self.board.spool(), stage.as_deref());
            if let Some(next) = self.viewers.wait(&mut waiter, spool, stage, now) {
                again = again.min(next);
            }
            let longest = again.saturating_duration_since(now);
            if waiter.wait(Some(longest)).is_err() {
                // Not for want of descriptors, of which there are a few. Not to spin in case it goes on.
                std::thread::sleep(SECOND);
                continue;
            }
            let now = Instant::now();
            if waiter.ready(wake).read {
                self.board.wake().clear();
            }
            // An answer has all that was left before its question.
            self.pick_up(now);
            if helper.is_some_and(|helper| waiter.ready(helper).read) {
                self.hear_helper();
            }
            let Self {
                clients,
                viewers,
                view,
                board,
                ..
            } = &mut self;
            let stage = board.stage();
            viewers.turn(&waiter, board.spool(), stage.as_deref(), now);
            let full = viewers.is_full();
            clients.turn(&waiter, now, |kind, request| {
                answer(view, board, full, kind, request, now)
            });
            for new in clients.leaving() {
                if viewers.is_full() {
                    // Several came in one round; the answer is not sent yet, and this one is hung up on.
                    continue;
                }
                viewers.admit(new.stream, new.hello, new.from, new.typed);
            }
            if control.is_some_and(|index| waiter.ready(index).read) {
                admit_at[0] = now + Kind::Control.pace();
                if let Some(stream) = self.socket.as_ref().and_then(ControlSocket::accept) {
                    self.clients.admit(Socket::Unix(stream), Kind::Control, now);
                }
            }
            if scrape.is_some_and(|index| waiter.ready(index).read) {
                admit_at[1] = now + Kind::Scrape.pace();
                if let Some((stream, _)) = self.metrics.as_ref().and_then(|l| l.accept().ok())
                    && stream.set_nonblocking(true).is_ok()
                {
                    self.clients.admit(Socket::Tcp(stream), Kind::Scrape, now);
                }
            }
        }
    }

    /// Takes in what the role has left.
    fn pick_up(&mut self, now: Instant) {
        while let Some(update) = self.board.next() {
            if let Some(change) = self.view.take(update, now) {
                self.tell(&change);
            }
        }
        match self.board.take_lost() {
            0 => {}
            lost => self
                .view
                .note_own(format!("{lost} events came too fast to be kept"), false),
        }
    }

    /// A change of role: to the log, and to the hook.
    fn tell(&mut self, change: &Change) {
        let (event, role) = (change.event.as_str(), change.role.as_str());
        let protected = change.protected;
        if matches!(event, "live" | "unprotected" | "frozen") {
            tracing::warn!(event, role, protected, "change of role: {event}");
        } else {
            tracing::info!(event, role, protected, "change of role: {event}");
        }
        if let Some(helper) = &mut self.helper
            && let Err(error) = helper.tell(change)
        {
            self.hook_failed(event, &error.to_string());
        }
    }

    fn hear_helper(&mut self) {
        let Some(helper) = &mut self.helper else {
            return;
        };
        let mut runs = Vec::new();
        let alive = helper.hear(|ran| runs.push(ran));
        for ran in runs {
            match ran.failure {
                None => self.view.hook_ran(true),
                Some(why) => self.hook_failed(&ran.event, &why),
            }
        }
        if !alive {
            self.helper = None;
            tracing::warn!("the process that runs the hook is gone; it will not be run any more");
            self.view
                .note_own("the process that runs the hook is gone".into(), true);
        }
    }

    fn hook_failed(&mut self, event: &str, why: &str) {
        self.view.hook_ran(false);
        let text = format!("the hook failed at the change `{event}`: {why}");
        tracing::warn!("{text}");
        self.view.note_own(text, true);
    }

    /// Says that the machine is unprotected, now and then; when to say it next.
    fn nag(&mut self, due: Duration, now: Instant) -> Duration {
        let Some(alone) = self.view.unprotected_for(now) else {
            return NAG_EVERY;
        };
        if alone < due {
            return due;
        }
        // To the log alone: that it lost its protection is among the events, and must not be pushed out by this.
        self.reporter.repeat(&Event::Notice {
            text: format!(
                "UNPROTECTED for {} minutes: nobody takes over if this process or its host dies",
                alone.as_secs() / 60
            ),
            loud: true,
        });
        due + NAG_EVERY
    }
}

/// A backup that is further behind than this gets no machine handed to: its guest would stand for all of that. The primary waits for
/// one that is `timing.lag_ms` behind, so such a one is in trouble.
const LAGS: Duration = Duration::from_millis(50);

/// Orders what can be ordered of this role as it stands.
fn order(view: &View, board: &Board, ask: Ask) -> Result<u64, String> {
    let (state, name) = (view.state(), view.name());
    let too_many = || "too many orders wait already".to_owned();
    if ask == Ask::Leave {
        // What it is when it takes the order counts; this saves one that is plainly a mistake the way.
        if state.role != Role::Backup {
            return Err(format!(
                "this process serves machine {name}, and only a backup leaves: doppel power-off {name} turns the machine off"
            ));
        }
        return board.order(Command::Leave).ok_or_else(too_many);
    }
    if state.role == Role::Backup {
        return Err(format!(
            "this process is the backup of machine {name}, and orders go to the one that serves it: its primary, on this host or \
             another. doppel status {name} shows what runs here"
        ));
    }
    if state.role == Role::Solo && ask != Ask::Reset {
        return Err(format!(
            "machine {name} runs without a pair (doppel run, doppel record): end it with SIGTERM, or start it as doppel primary --alone"
        ));
    }
    let command = match ask {
        Ask::Status | Ask::Console { .. } | Ask::Leave => {
            return Err("this is no order".to_owned());
        }
        // It is done when it is known: the next look for a backup looks there, too.
        Ask::Standby(place) => {
            return match board.add_place(place) {
                true => Ok(0),
                false => Err("too many places for backups are known already".to_owned()),
            };
        }
        Ask::Switch => Command::Switch,
        Ask::MigrateBackup(to) => Command::MigrateBackup(to),
        Ask::PowerOff => Command::PowerOff,
        Ask::Reset => Command::Reset,
        Ask::Fail => Command::Fail,
        Ask::Share(share @ 0) => Command::Share(Pace::of(share)),
        Ask::Share(share) if Pace::LEAST <= Pace::of(share) && share <= Control::WHOLE => {
            Command::Share(Pace::of(share))
        }
        Ask::Share(share) => {
            return Err(format!(
                "a share is 0, or from {} to {} 1024ths, not {share}",
                Pace::LEAST.share(),
                Control::WHOLE
            ));
        }
    };
    match (command, state.standing) {
        (Command::Switch, Standing::Protected) => match view.lag() {
            Some(lag) if lag > LAGS => {
                return Err(format!(
                    "the backup is {} ms behind, and the guest would stand for as long: see why (doppel status {name}), and try again",
                    lag.as_millis()
                ));
            }
            _ => {}
        },
        (_, Standing::SwitchingOver) => {
            return Err("a switch-over is under way: order it again when it is over".to_owned());
        }
        (Command::Switch | Command::Fail, Standing::Unprotected | Standing::Joining) => {
            return Err(format!(
                "machine {name} has no backup that could take it: start one (doppel backup), wait until doppel status {name} says \
                 PROTECTED, and try again"
            ));
        }
        (Command::MigrateBackup(_), Standing::Unprotected | Standing::Joining) => {
            return Err(format!(
                "machine {name} has no backup whose place another one could take: one that listens joins by itself"
            ));
        }
        (_, Standing::Protected | Standing::Unprotected | Standing::Joining) => {}
        (_, standing) => {
            return Err(format!(
                "this process does not serve machine {name} now ({}): ask again when it is decided who does",
                standing.word()
            ));
        }
    }
    board.order(command).ok_or_else(too_many)
}

/// What somebody is shown of what came before, who asks for nothing else: about a screen of it.
const TAIL: u64 = 4 << 10;

/// From which byte on somebody is shown the console who wants it from this one on.
fn console(view: &View, board: &Board, full: bool, from: Option<u64>) -> Result<u64, String> {
    let (state, name) = (view.state(), view.name());
    if state.role == Role::Backup {
        return Err(format!(
            "this process is the backup of machine {name}, and its console is shown by the one that serves it: its primary, on this host or another"
        ));
    }
    if full {
        return Err(format!(
            "{} look at this console already: end one of them",
            viewers::MOST
        ));
    }
    let oldest = board.spool().oldest();
    let tail = board.spool().head().saturating_sub(TAIL);
    Ok(from.unwrap_or(tail).max(oldest))
}

fn answer(
    view: &View,
    board: &Board,
    full: bool,
    kind: Kind,
    request: &[u8],
    now: Instant,
) -> Reply {
    let said = match kind {
        Kind::Scrape => prometheus::respond(request, || {
            prometheus::page(&view.status(now), &view.latencies(), &view.stops())
        }),
        Kind::Control => Answer::new(match Request::decode(request) {
            Ok(Request {
                ask: Ask::Status, ..
            }) => Outcome::Status(Box::new(view.status(now))),
            Ok(Request {
                ask: Ask::Console { from },
                ..
            }) => match console(view, board, full, from) {
                Ok(at) => {
                    let hello = Answer::new(Outcome::Console(at)).encode();
                    return Reply::Console(hello, at);
                }
                Err(why) => Outcome::Error(why),
            },
            Ok(Request { ask, .. }) => match order(view, board, ask) {
                Ok(number) => Outcome::Ordered(number),
                Err(why) => Outcome::Error(why),
            },
            Err(why) => Outcome::Error(why),
        })
        .encode(),
    };
    Reply::Bytes(said)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::super::find;
    use super::*;
    use crate::config;

    #[test]
    fn what_cannot_be_done_is_refused_with_what_to_do() {
        use super::super::board::{State, Update};
        use super::super::view::tests::at_work;

        let board = Board::new("kv", Role::Primary).unwrap();
        let mut view = at_work();
        let now = Instant::now();
        assert_eq!(order(&view, &board, Ask::Switch), Ok(1));
        assert_eq!(order(&view, &board, Ask::Share(512)), Ok(2));
        assert_eq!(board.take_command(), Some((1, Command::Switch)));
        assert_eq!(
            board.take_command(),
            Some((2, Command::Share(Pace::of(512))))
        );
        let share = order(&view, &board, Ask::Share(3)).unwrap_err();
        assert!(share.contains("64 to 1024"), "{share}");
        let mut refused = |role, standing, ask| {
            let state = State {
                role,
                standing,
                record: None,
            };
            view.take(Update::Stands(state), now);
            order(&view, &board, ask).unwrap_err()
        };
        for (role, standing, ask, word) in [
            (
                Role::Backup,
                Standing::Following,
                Ask::Switch,
                "go to the one that serves it",
            ),
            (Role::Solo, Standing::Unprotected, Ask::PowerOff, "SIGTERM"),
            (
                Role::Primary,
                Standing::Unprotected,
                Ask::Switch,
                "has no backup",
            ),
            (
                Role::Primary,
                Standing::Unprotected,
                Ask::Fail,
                "has no backup",
            ),
            (
                Role::Primary,
                Standing::Protected,
                Ask::Leave,
                "only a backup leaves",
            ),
            (
                Role::Solo,
                Standing::Unprotected,
                Ask::Leave,
                "only a backup leaves",
            ),
            (
                Role::Primary,
                Standing::Joining,
                Ask::MigrateBackup(None),
                "joins by itself",
            ),
            (
                Role::Primary,
                Standing::SwitchingOver,
                Ask::PowerOff,
                "is under way",
            ),
            (
                Role::Primary,
                Standing::Frozen,
                Ask::Share(0),
                "when it is decided",
            ),
        ] {
            let why = refused(role, standing, ask);
            assert!(why.contains(word), "{why}");
        }
        assert_eq!((board.take_command(), board.is_dismissed()), (None, false));
        // Whoever takes it decides: by then the backup may be one no more.
        let state = State {
            role: Role::Backup,
            standing: Standing::Following,
            record: None,
        };
        view.take(Update::Stands(state), now);
        assert_eq!(order(&view, &board, Ask::Leave), Ok(3));
        assert!(board.is_dismissed());
        assert_eq!(board.take_command(), Some((3, Command::Leave)));
        assert_eq!((board.take_command(), board.is_dismissed()), (None, false));
    }

    #[test]
    fn nothing_is_handed_to_a_backup_that_lags() {
        use super::super::view::tests::lagging_by;

        let board = Board::new("kv", Role::Primary).unwrap();
        let view = lagging_by(4 * LAGS);
        let why = order(&view, &board, Ask::Switch).unwrap_err();
        assert!(why.contains("ms behind"), "{why}");
        assert!(order(&view, &board, Ask::Share(0)).is_ok());
        assert!(order(&lagging_by(LAGS / 4), &board, Ask::Switch).is_ok());
    }

    fn config(directory: &std::path::Path) -> Config {
        Config {
            name: "kv".into(),
            run_dir: Some(directory.to_owned()),
            metrics: Some("0".parse().unwrap()),
            // A call that is not on the thread's list would end this process.
            sandbox: config::Sandbox {
                enabled: true,
                strict: true,
            },
            ..Config::default()
        }
    }

    #[test]
    fn a_confined_thread_tells_what_the_role_leaves_and_takes_its_socket_along() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let operator = Operator::start(&config, Role::Backup, false).unwrap();
        let other = Operator::start(
            &Config {
                name: "web".into(),
                ..config
            },
            Role::Solo,
            false,
        );
        // One process is one role: the second one here only shows that names do not meet.
        let other = other.unwrap();
        operator.board().said("a primary was refused", true);
        operator.board().stands_as(Standing::Waiting);
        let found = find::roles(directory.path(), Some("kv")).unwrap();
        assert_eq!(found.len(), 1);
        let status = found[0].outcome.as_ref().unwrap();
        assert_eq!(
            (status.role, status.standing),
            (Role::Backup, Standing::Waiting)
        );
        assert_eq!(status.pid, std::process::id());
        assert_eq!(status.events[0].text, "a primary was refused");
        assert_eq!(status.changes["waiting"], 1);
        assert_eq!(find::roles(directory.path(), None).unwrap().len(), 2);

        let mut scraper = TcpStream::connect(status.metrics.as_deref().unwrap()).unwrap();
        scraper.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut page = String::new();
        scraper.read_to_string(&mut page).unwrap();
        assert!(page.contains("doppel_protected{name=\"kv\"} 0\n"), "{page}");

        operator.end("told to");
        drop(other);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(find::roles(directory.path(), None).unwrap().is_empty());
        assert!(
            find::roles(&directory.path().join("none"), None)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn metrics_that_cannot_be_served_and_a_directory_that_was_named_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = config(directory.path());
        config.metrics = Some(config::MetricsAddress(taken.local_addr().unwrap()));
        let refused = Operator::start(&config, Role::Primary, false).unwrap_err();
        assert!(matches!(refused, ControlError::Metrics { .. }), "{refused}");
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        config.metrics = None;
        config.run_dir = Some(file);
        let refused = Operator::start(&config, Role::Primary, false).unwrap_err();
        assert!(
            matches!(refused, ControlError::Directory { .. }),
            "{refused}"
        );
    }
}
