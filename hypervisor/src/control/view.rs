//! What the operator's thread knows of its role, put together from what was left on the board and from the meter.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::board::{State, Update};
use super::hook::Change;
use super::status::{
    Arbiter, Happened, Hook, Latency, Ordered, Peer, Role, Standing, Status, Totals,
};
use crate::meter::Latencies;
use crate::orders::{Orders, Pace, Samples};

/// Events that are kept for who asks later.
const EVENTS: usize = 32;
/// Orders that are kept.
const ORDERS: usize = 16;
/// Seconds that are drawn.
const HISTORY: usize = 60;
/// Seconds that rates are of.
const RATES: usize = 5;
/// Seconds that recent latencies are of.
const RECENT: usize = 10;

/// What does not change while the process lives.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub(super) name: String,
    pub(super) instance: Option<String>,
    pub(super) transport: Option<String>,
    pub(super) arbiter: Option<String>,
    pub(super) metrics: Option<SocketAddr>,
    pub(super) hook: bool,
}

/// One second's work.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    done: Totals,
    lag: Duration,
}

/// All of it.
#[derive(Debug)]
pub(super) struct View {
    about: About,
    started: Instant,
    state: State,
    since: Instant,
    unprotected_since: Option<Instant>,
    /// The change of role that was told last.
    announced: Option<&'static str>,
    peer: Option<SocketAddr>,
    arbiter: Arbiter,
    asked_at: Option<Instant>,
    changes: BTreeMap<String, u64>,
    hook: Hook,
    events: VecDeque<Happened>,
    orders: VecDeque<Ordered>,
    figures: Option<(Arc<Samples>, Arc<Orders>)>,
    /// As they stood at the last second.
    totals: Totals,
    seconds: VecDeque<Second>,
    readings: VecDeque<Latencies>,
}

fn keep<T>(list: &mut VecDeque<T>, most: usize, new: T) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(new);
}

/// What changes of role are called.
pub(super) const CHANGES: [&str; 8] = [
    "waiting",
    "following",
    "protected",
    "switching-over",
    "live",
    "unprotected",
    "frozen",
    "ended",
];

/// What a change of role is called, if this is one that was not told yet; one of [`CHANGES`].
fn event(
    announced: Option<&'static str>,
    before: Role,
    standing: Standing,
) -> Option<&'static str> {
    let word = match standing {
        Standing::Waiting => "waiting",
        Standing::Following => "following",
        Standing::Protected => "protected",
        Standing::SwitchingOver => "switching-over",
        Standing::Unprotected | Standing::Joining if before == Role::Backup => "live",
        Standing::Unprotected | Standing::Joining => "unprotected",
        Standing::Frozen => "frozen",
        Standing::Ended => "ended",
        // On the way to something else.
        Standing::Starting | Standing::TakingOver | Standing::Deciding => return None,
    };
    let known = announced == Some(word) || (announced == Some("live") && word == "unprotected");
    (!known).then_some(word)
}

impl View {
    pub(super) fn new(about: About, role: Role, now: Instant) -> Self {
        Self {
            arbiter: Arbiter {
                place: about.arbiter.clone(),
                ..Arbiter::default()
            },
            hook: Hook {
                configured: about.hook,
                ..Hook::default()
            },
            about,
            started: now,
            state: State {
                role,
                standing: Standing::Starting,
                record: None,
            },
            since: now,
            unprotected_since: None,
            announced: None,
            peer: None,
            asked_at: None,
            changes: BTreeMap::new(),
            events: VecDeque::new(),
            orders: VecDeque::new(),
            figures: None,
            totals: Totals::default(),
            seconds: VecDeque::new(),
            readings: VecDeque::new(),
        }
    }

    /// Takes one update in; the change of role that it is, if it is one.
    pub(super) fn take(&mut self, update: Update, now: Instant) -> Option<Change> {
        match update {
            Update::Attach(samples, orders) => self.figures = Some((samples, orders)),
            Update::Detach => self.figures = None,
            Update::Peer(address) => self.peer = address,
            Update::Said(happened) => self.note(happened),
            Update::Ordered(ordered) => self.note_order(ordered),
            Update::Arbiter(error) => {
                self.asked_at = Some(now);
                self.arbiter.answered = Some(error.is_none());
                self.arbiter.questions[0] += 1;
                self.arbiter.questions[1] += u64::from(error.is_some());
                self.arbiter.error = error;
            }
            Update::Stands(state) => return self.stands(state, now),
        }
        None
    }

    /// What has come of an order stands where the order stood: several may be under way.
    fn note_order(&mut self, ordered: Ordered) {
        if let Some(before) = self
            .orders
            .iter_mut()
            .find(|of| of.number == ordered.number)
        {
            *before = ordered;
            return;
        }
        keep(&mut self.orders, ORDERS, ordered);
    }

    fn stands(&mut self, state: State, now: Instant) -> Option<Change> {
        let before = std::mem::replace(&mut self.state, state);
        if before.standing != state.standing || before.role != state.role {
            self.since = now;
        }
        self.unprotected_since = match state.standing.is_unprotected() {
            true => Some(self.unprotected_since.unwrap_or(now)),
            false => None,
        };
        let event = event(self.announced, before.role, state.standing)?;
        self.announced = Some(event);
        *self.changes.entry(event.to_owned()).or_default() += 1;
        Some(Change {
            event: event.to_owned(),
            name: self.about.name.clone(),
            role: state.role.word().to_owned(),
            standing: state.standing.word().to_owned(),
            protected: state.standing.is_protected(),
            epoch: self.epoch(),
            position: self.position(),
            peer: self.peer_identity().unwrap_or_default(),
            peer_address: String::new(),
            pid: std::process::id(),
            unix_ms: super::board::unix_ms(),
        })
    }

    /// A line for the history.
    pub(super) fn note(&mut self, happened: Happened) {
        keep(&mut self.events, EVENTS, happened);
    }

    /// A line of the operator's own thread.
    pub(super) fn note_own(&mut self, text: String, loud: bool) {
        self.note(Happened {
            unix_ms: super::board::unix_ms(),
            epoch: self.epoch(),
            position: self.position(),
            loud,
            text,
        });
    }

    /// The hook was run.
    pub(super) fn hook_ran(&mut self, well: bool) {
        self.hook.runs += 1;
        self.hook.failures += u64::from(!well);
    }

    /// For how long the machine has run unprotected; none if it is protected, or never was to be.
    pub(super) fn unprotected_for(&self, now: Instant) -> Option<Duration> {
        let since = self.unprotected_since?;
        (self.state.role != Role::Solo).then(|| now.saturating_duration_since(since))
    }

    /// A second has passed.
    pub(super) fn second(&mut self) {
        let now = self.totals();
        let before = std::mem::replace(&mut self.totals, now);
        let lag = match &self.figures {
            Some((samples, _)) => samples.meter().take_longest_lag(),
            None => Duration::ZERO,
        };
        let second = Second {
            done: difference(now, before),
            lag,
        };
        keep(&mut self.seconds, HISTORY, second);
        let reading = self.latencies();
        keep(&mut self.readings, RECENT, reading);
    }

    fn epoch(&self) -> u64 {
        self.state.record.map_or(0, |record| record.epoch.0)
    }

    fn position(&self) -> u64 {
        match &self.figures {
            Some((_, orders)) => orders.position().0,
            None => 0,
        }
    }

    fn peer_identity(&self) -> Option<String> {
        let record = self.state.record?;
        let peer = match self.state.standing {
            Standing::Following | Standing::TakingOver => Some(record.owner),
            Standing::Protected | Standing::SwitchingOver => record.entitled,
            _ => None,
        };
        peer.map(|peer| peer.to_string())
    }

    fn totals(&self) -> Totals {
        let Some((samples, orders)) = &self.figures else {
            return Totals::default();
        };
        let meter = samples.meter();
        let [entries, entry_bytes] = meter.entries().map(|n| n as f64);
        let [outputs, output_bytes] = meter.outputs().map(|n| n as f64);
        let [frames, frame_bytes] = meter.frames().map(|n| n as f64);
        Totals {
            exits: orders.position().0 as f64,
            entries,
            entry_bytes,
            outputs,
            output_bytes,
            frames,
            frame_bytes,
        }
    }

    /// Commit latencies since the start.
    pub(super) fn latencies(&self) -> Latencies {
        match &self.figures {
            Some((samples, _)) => samples.meter().commits(),
            None => Latencies::default(),
        }
    }

    fn has_backup(&self) -> bool {
        matches!(
            self.state.standing,
            Standing::Protected | Standing::SwitchingOver
        )
    }

    /// The machine's name.
    pub(super) fn name(&self) -> &str {
        &self.about.name
    }

    /// How the role stands.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// How far the backup is behind, by its last heartbeat.
    pub(super) fn lag(&self) -> Option<Duration> {
        let (samples, _) = self.figures.as_ref()?;
        samples.meter().lag().filter(|_| self.has_backup())
    }

    /// Stops of the guest at the ends of intervals and where it was preempted, since the start.
    pub(super) fn stops(&self) -> Latencies {
        match &self.figures {
            Some((samples, _)) => samples.meter().stops(),
            None => Latencies::default(),
        }
    }

    pub(super) fn status(&self, now: Instant) -> Status {
        let latencies = self.latencies();
        let recent = match self.readings.front() {
            Some(then) => latencies.since(then),
            None => latencies.clone(),
        };
        let millis = |span: Duration| span.as_millis() as u64;
        let micros = |span: Duration| span.as_nanos() as f64 / 1000.0;
        let meter = self.figures.as_ref().map(|(samples, _)| samples.meter());
        let lag = meter.and_then(|meter| meter.lag());
        let has_backup = self.has_backup();
        let latest = self.seconds.iter().rev();
        let longest = latest.clone().take(RECENT).map(|second| second.lag).max();
        Status {
            name: self.about.name.clone(),
            instance: self.about.instance.clone(),
            role: self.state.role,
            standing: self.state.standing,
            protected: self.state.standing.is_protected(),
            standing_ms: millis(now.saturating_duration_since(self.since)),
            pid: std::process::id(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: millis(now.saturating_duration_since(self.started)),
            epoch: self.epoch(),
            configuration: self.state.record.map_or(0, |record| record.configuration.0),
            position: self.position(),
            lag_us: lag.filter(|_| has_backup).map(micros),
            lag_max_us: longest.filter(|_| has_backup).map(micros),
            commit: Latency::from(&latencies),
            commit_recent: Latency::from(&recent),
            stop: Latency::from(&self.stops()),
            stopped_for: meter.map_or([0; 2], |meter| meter.stopped_for()),
            totals: self.totals(),
            rates: average(latest.clone().take(RATES).map(|second| second.done)),
            transport: self.about.transport.clone(),
            peer: self.peer_identity().map(|identity| Peer {
                identity,
                address: self.peer.map(|address| address.to_string()),
                position: meter.map_or(0, |meter| meter.peer()),
            }),
            arbiter: Arbiter {
                asked_ms_ago: self
                    .asked_at
                    .map(|at| millis(now.saturating_duration_since(at))),
                ..self.arbiter.clone()
            },
            changes: self.changes.clone(),
            hook: self.hook,
            share: match &self.figures {
                Some((_, orders)) => orders.share().share(),
                None => Pace::FULL.share(),
            },
            ordered: self.orders.back().cloned(),
            orders: self.orders.iter().cloned().collect(),
            metrics: self.about.metrics.map(|address| address.to_string()),
            history: self
                .seconds
                .iter()
                .map(|second| second.done.exits as u64)
                .collect(),
            events: self.events.iter().cloned().collect(),
        }
    }
}

fn zip(one: Totals, other: Totals, with: impl Fn(f64, f64) -> f64) -> Totals {
    Totals {
        exits: with(one.exits, other.exits),
        entries: with(one.entries, other.entries),
        entry_bytes: with(one.entry_bytes, other.entry_bytes),
        outputs: with(one.outputs, other.outputs),
        output_bytes: with(one.output_bytes, other.output_bytes),
        frames: with(one.frames, other.frames),
        frame_bytes: with(one.frame_bytes, other.frame_bytes),
    }
}

/// A backup that meets another primary begins anew: what it did for the first one is over.
fn difference(now: Totals, before: Totals) -> Totals {
    zip(now, before, |now, before| (now - before).max(0.0))
}

fn average(seconds: impl Iterator<Item = Totals>) -> Totals {
    let mut count = 0.0;
    let sum = seconds.fold(Totals::default(), |sum, second| {
        count += 1.0;
        zip(sum, second, |sum, second| sum + second)
    });
    zip(
        sum,
        sum,
        |sum, _| if count > 0.0 { sum / count } else { 0.0 },
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::board::Board;
    use super::*;
    use crate::backends::wait::Wake;
    use crate::position::Position;
    use crate::protocol::{Identity, Record};
    use crate::stage::Stage;

    fn view(role: Role) -> View {
        let about = About {
            name: "kv".into(),
            instance: None,
            transport: Some("shm".into()),
            arbiter: Some("/srv/arbiter".into()),
            metrics: None,
            hook: false,
        };
        View::new(about, role, Instant::now())
    }

    /// An agent's order is under way, and a person at the host gives another one.
    #[test]
    fn what_came_of_an_order_is_told_whatever_was_ordered_since() {
        let mut view = view(Role::Primary);
        let mut tell = |number, outcome| {
            let what = "switch".to_owned();
            let ordered = Ordered {
                number,
                what,
                outcome,
            };
            view.take(Update::Ordered(ordered), Instant::now());
            view.status(Instant::now())
        };
        tell(1, None);
        tell(2, None);
        let why = Err("the backup is not ready".to_owned());
        let status = tell(1, Some(why.clone()));
        assert_eq!(status.outcome_of(1), Some(&why));
        assert_eq!((status.outcome_of(2), status.outcome_of(3)), (None, None));
        assert_eq!(status.ordered.unwrap().number, 2, "the last that was given");
        let last = (3..30).map(|number| tell(number, None)).last().unwrap();
        assert_eq!((last.orders.len(), last.orders[0].number), (ORDERS, 14));
    }

    const ME: Identity = Identity::from_bytes([1; 16]);
    const PEER: Identity = Identity::from_bytes([2; 16]);

    fn stands(view: &mut View, role: Role, standing: Standing) -> Option<String> {
        let record = Some(Record::cold_start(None, ME, Some(PEER)));
        let state = State {
            role,
            standing,
            record,
        };
        view.take(Update::Stands(state), Instant::now())
            .map(|change| change.event)
    }

    /// What a role of this kind tells while it goes through these.
    fn told(role: Role, steps: &[(Role, Standing)]) -> Vec<String> {
        let mut view = view(role);
        steps
            .iter()
            .filter_map(|&(role, standing)| stands(&mut view, role, standing))
            .collect()
    }

    #[test]
    fn every_change_of_role_is_told_once() {
        use Role::{Backup, Primary};
        use Standing::*;
        let primary = [
            (Primary, Protected),
            (Primary, Deciding),
            (Primary, Unprotected),
            (Primary, Joining),
            (Primary, Unprotected),
            (Primary, Joining),
            (Primary, Protected),
            (Primary, Ended),
        ];
        assert_eq!(
            told(Primary, &primary),
            ["protected", "unprotected", "protected", "ended"]
        );
        let switched = [
            (Primary, Protected),
            (Primary, SwitchingOver),
            (Primary, Protected),
            (Primary, SwitchingOver),
            (Primary, Deciding),
            (Primary, Ended),
        ];
        assert_eq!(
            told(Primary, &switched),
            [
                "protected",
                "switching-over",
                "protected",
                "switching-over",
                "ended"
            ]
        );
        let backup = [
            (Backup, Waiting),
            (Backup, Following),
            (Backup, TakingOver),
            (Backup, Following),
            (Backup, TakingOver),
            (Primary, Unprotected),
            (Primary, Joining),
            (Primary, Unprotected),
            (Primary, Protected),
            (Primary, Frozen),
            (Primary, Ended),
        ];
        assert_eq!(
            told(Backup, &backup),
            [
                "waiting",
                "following",
                "live",
                "protected",
                "frozen",
                "ended"
            ]
        );
    }

    #[test]
    fn every_change_is_one_of_the_events() {
        let mut seen = std::collections::BTreeSet::new();
        for before in [Role::Backup, Role::Primary, Role::Solo] {
            seen.extend(
                Standing::ALL
                    .into_iter()
                    .filter_map(|now| event(None, before, now)),
            );
        }
        assert_eq!(seen, CHANGES.into_iter().collect());
    }

    /// A view of a primary that has done some work.
    pub(in crate::control) fn at_work() -> View {
        let mut view = view(Role::Primary);
        let samples: Arc<Samples> = Arc::default();
        let orders = Arc::new(Orders::new(Arc::new(Wake::new().unwrap())));
        orders.working(Position(1000));
        for nanos in [900, 1000, 1100, 50_000] {
            samples.commit(Duration::from_nanos(nanos));
        }
        samples.meter().posted(1000, 64, Instant::now());
        samples.meter().left(60);
        samples.meter().frame(70);
        samples.meter().peer_is_at(1000, true);
        view.take(Update::Attach(samples, orders), Instant::now());
        stands(&mut view, Role::Primary, Standing::Protected);
        view
    }

    /// A view of a primary whose backup has not replayed an entry of this age.
    pub(in crate::control) fn lagging_by(age: Duration) -> View {
        let mut view = view(Role::Primary);
        let samples: Arc<Samples> = Arc::default();
        let orders = Arc::new(Orders::new(Arc::new(Wake::new().unwrap())));
        // The meter counts time from its own beginning.
        let since = Instant::now();
        samples.meter().posted(1000, 64, since);
        while since.elapsed() < age {
            std::thread::sleep(age - since.elapsed().min(age));
        }
        samples.meter().peer_is_at(999, true);
        view.take(Update::Attach(samples, orders), Instant::now());
        stands(&mut view, Role::Primary, Standing::Protected);
        view
    }

    /// A backup whose primary died while it joined waits for another, with what it held before.
    #[test]
    fn nothing_of_a_machine_that_came_to_nothing_is_held() {
        let board = Board::new("kv", Role::Backup).unwrap();
        let wake = Arc::new(Wake::new().unwrap());
        let samples: Arc<Samples> = Arc::default();
        let orders = Arc::new(Orders::new(Arc::clone(&wake)));
        let stage = Arc::new(Stage::new(wake));
        let mut view = view(Role::Backup);
        let held = || {
            [
                Arc::strong_count(&samples),
                Arc::strong_count(&orders),
                Arc::strong_count(&stage),
            ]
        };
        board.attach(&samples, &orders, &stage);
        while let Some(update) = board.next() {
            view.take(update, Instant::now());
        }
        assert_eq!(held(), [2, 3, 2]);
        orders.working(Position(1000));
        assert_eq!(view.status(Instant::now()).position, 1000);
        board.detach();
        while let Some(update) = board.next() {
            view.take(update, Instant::now());
        }
        assert_eq!(held(), [1, 1, 1]);
        assert_eq!(view.status(Instant::now()).position, 0);
    }

    #[test]
    fn figures_come_from_the_meter_and_rates_from_seconds() {
        let mut view = at_work();
        view.second();
        view.second();
        let status = view.status(Instant::now());
        assert_eq!((status.position, status.epoch), (1000, 1));
        assert_eq!(status.totals.exits, 1000.0);
        assert_eq!(status.rates.exits, 500.0);
        assert_eq!(status.history, [1000, 0]);
        assert_eq!(status.commit.count, 4);
        assert_eq!(status.commit.max_us, 50.0);
        assert_eq!(
            status.commit_recent.count, 0,
            "there was none since the first second's end"
        );
        assert_eq!(status.lag_us, Some(0.0));
        assert_eq!(status.peer.unwrap().identity, PEER.to_string());
        let told: Status =
            serde_json::from_str(&serde_json::to_string(&view.status(Instant::now())).unwrap())
                .unwrap();
        assert_eq!(told.events, view.status(Instant::now()).events);
    }

    #[test]
    fn a_machine_on_its_own_is_unprotected_and_one_that_was_meant_so_is_not_nagged_about() {
        let later = Instant::now() + Duration::from_secs(90);
        let mut alone = view(Role::Primary);
        stands(&mut alone, Role::Primary, Standing::Unprotected);
        assert!(alone.unprotected_for(later).unwrap() >= Duration::from_secs(80));
        assert!(!alone.status(later).protected);
        stands(&mut alone, Role::Primary, Standing::Protected);
        assert_eq!(alone.unprotected_for(later), None);
        let mut solo = view(Role::Solo);
        stands(&mut solo, Role::Solo, Standing::Unprotected);
        assert_eq!(solo.unprotected_for(later), None);
        assert!(!solo.status(later).protected);
    }
}
