//! A failure detector that only counts: arrivals and clock readings in, trust out.
//!
//! The timeout adapts to what the peer's heartbeats have looked like: mean distance plus eight mean deviations (as
//! TCP's retransmission timer, RFC 6298, but with more slack, since a false take-over costs more than a
//! repeated segment), and never less than twice the worst distance of the last seconds, so that a loaded host which
//! hiccups regularly is not given up at the next hiccup. Nor is it less than twice the worst lateness of this process's own
//! polls: a host that keeps one process waiting keeps the other waiting too, where both are on it, and a silence that a late
//! listener measured is uncertain by that much where they are not. A floor and a ceiling bound it.
//!
//! Log traffic is a sign of life too, but only heartbeats are measured: the log comes in bursts, and a thousand
//! entries a microsecond apart would teach that a millisecond of silence is death.

use std::time::Duration;

use super::heartbeat::Progress;
use super::notice::Evidence;
use super::time::Moment;

/// The bounds of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// The timeout is never shorter. 30 ms is six heartbeats: several must be lost in a row. Too small shows as take-overs
    /// of healthy primaries on a busy host.
    pub floor: Duration,
    /// The timeout is never longer, and starts here: it comes down as heartbeats are measured. It bounds how long a silent
    /// loss can go unnoticed.
    pub ceiling: Duration,
    /// A gap between two of the detector's own polls from which it counts as not having been scheduled. Half the
    /// floor: a shorter gap cannot by itself use up a timeout.
    pub nap: Duration,
    /// How long a vCPU thread that owes work may make no progress, not counting the time that it has certainly stood in
    /// line for a CPU. Generous, since one page fault of a host that swaps can take long, and only wedged threads are meant.
    pub wedged: Duration,
    /// How long it may make no progress at all. A host that gives it no CPU for so long cannot run the machine.
    pub starved: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            floor: Duration::from_millis(30),
            ceiling: Duration::from_millis(300),
            nap: Duration::from_millis(15),
            wedged: Duration::from_secs(2),
            starved: Duration::from_secs(20),
        }
    }
}

/// How many heartbeats are measured before the timeout is what they teach: a third of a second's worth. Until then its floor comes down
/// from the ceiling with each of them. Where it stayed at the ceiling, a host that was lost in the first third of a second of a pair was
/// taken over after 300 ms instead of 50.
const LEARNING: u32 = 64;

/// How many naps in a row, with nothing heard in between, start the count afresh. More would let a host too busy to
/// poll in time never notice anything; from then on the silence is counted through.
const FRESH_STARTS: u32 = 3;

/// How long the worst lateness of this process's own polls is remembered: it fades by a factor of e in this time, as the worst
/// distance of the peer's heartbeats does in about as long.
const OWN_MEMORY: Duration = Duration::from_secs(2);

/// What to think of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It is well.
    Trusted,
    /// Nothing was heard for half the timeout: watch, but do nothing.
    Doubted(Duration),
    /// It is given up.
    Suspected(Evidence),
}

/// What a detector saw since it was last asked, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Watched {
    /// The longest time in which nothing was heard.
    pub silence: Duration,
    /// The longest gap between two of its own polls.
    pub own_gap: Duration,
}

/// Watches one peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Detector {
    limits: Limits,
    counting_from: Moment,
    last_poll: Moment,
    last_beat: Option<Moment>,
    fresh_starts: u32,
    beats: u32,
    mean: u64,
    deviation: u64,
    worst: u64,
    /// The longest gap between two polls of our own, fading.
    own_worst: u64,
    progress: Option<(Progress, Moment)>,
    watched: Watched,
}

impl Detector {
    /// A detector that starts to count at `now`.
    #[must_use]
    pub fn new(now: Moment, limits: Limits) -> Self {
        Self {
            limits,
            counting_from: now,
            last_poll: now,
            last_beat: None,
            fresh_starts: 0,
            beats: 0,
            mean: 0,
            deviation: 0,
            worst: 0,
            own_worst: 0,
            progress: None,
            watched: Watched::default(),
        }
    }

    /// Something of the peer's log arrived.
    pub fn heard_log(&mut self, now: Moment) {
        self.note_silence(now);
        self.counting_from = self.counting_from.max(now);
        self.fresh_starts = 0;
    }

    /// A heartbeat of the peer arrived.
    pub fn heard_beat(&mut self, now: Moment, progress: Progress) {
        self.heard_log(now);
        // What piled up while this process slept says nothing about the peer.
        if now.since(self.last_poll) <= self.limits.nap {
            if let Some(last) = self.last_beat {
                self.measure(now.since(last));
            }
            self.last_beat = Some(now);
        } else {
            self.last_beat = None;
        }
        match &mut self.progress {
            Some((known, _)) if progress.owes && known.turns == progress.turns => *known = progress,
            slot => *slot = Some((progress, now)),
        }
    }

    fn measure(&mut self, distance: Duration) {
        let ceiling = as_nanos(self.limits.ceiling);
        let sample = as_nanos(distance).min(ceiling);
        if self.beats == 0 {
            (self.mean, self.deviation) = (sample, sample / 2);
        } else {
            self.deviation = (self.deviation * 3 + self.mean.abs_diff(sample)) / 4;
            self.mean = (self.mean * 7 + sample) / 8;
        }
        // Halves in about 350 heartbeats, a little under two seconds at the default rate.
        self.worst = sample.max(self.worst - self.worst / 512);
        self.beats = self.beats.saturating_add(1);
    }

    /// The silence after which the peer is suspected, as of now.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        let Limits { floor, ceiling, .. } = self.limits;
        if self.beats == 0 {
            return ceiling;
        }
        let unlearned = LEARNING.saturating_sub(self.beats);
        let floor = floor + (ceiling - floor) * unlearned / LEARNING;
        let wanted = (self.mean + 8 * self.deviation)
            .max(2 * self.worst)
            .max(2 * self.own_worst);
        Duration::from_nanos(wanted).clamp(floor, ceiling)
    }

    /// Judges the peer. The second value is the length of this process's own nap, if it just awoke from one.
    pub fn poll(&mut self, now: Moment) -> (Trust, Option<Duration>) {
        let gap = now.since(self.last_poll);
        self.last_poll = self.last_poll.max(now);
        let napped = gap > self.limits.nap;
        self.watched.own_gap = self.watched.own_gap.max(gap);
        self.note_silence(now);
        self.note_own(gap);
        if napped {
            self.last_beat = None;
            if self.fresh_starts < FRESH_STARTS {
                self.fresh_starts += 1;
                self.counting_from = now;
                if let Some((_, since)) = &mut self.progress {
                    *since = now;
                }
            }
        }
        (self.judge(now), napped.then_some(gap))
    }

    fn note_silence(&mut self, now: Moment) {
        self.watched.silence = self.watched.silence.max(now.since(self.counting_from));
    }

    /// What was seen since the last call.
    pub fn take_watched(&mut self) -> Watched {
        std::mem::take(&mut self.watched)
    }

    /// How late this process is itself. A gap longer than any timeout is no lateness: it was stopped, or its host was.
    fn note_own(&mut self, gap: Duration) {
        let faded = u128::from(self.own_worst) * gap.min(OWN_MEMORY).as_nanos();
        self.own_worst -= u64::try_from(faded / OWN_MEMORY.as_nanos()).unwrap_or(self.own_worst);
        if gap <= self.limits.ceiling {
            self.own_worst = self.own_worst.max(as_nanos(gap));
        }
    }

    fn judge(&self, now: Moment) -> Trust {
        let silence = now.since(self.counting_from);
        if silence >= self.timeout() {
            return Trust::Suspected(Evidence::Silence(silence));
        }
        if let Some((progress, since)) = self.progress {
            let still = now.since(since);
            let working = still.saturating_sub(progress.stood);
            if progress.owes && (working >= self.limits.wedged || still >= self.limits.starved) {
                return Trust::Suspected(Evidence::Wedged(still));
            }
        }
        if silence >= self.timeout() / 2 {
            Trust::Doubted(silence)
        } else {
            Trust::Trusted
        }
    }

    /// When the silence so far becomes too long, if nothing is heard until then.
    #[must_use]
    pub fn deadline(&self) -> Moment {
        self.counting_from + self.timeout()
    }
}

fn as_nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Position;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn busy(turns: u64) -> Progress {
        Progress {
            position: Position(turns),
            turns,
            owes: true,
            stood: Duration::ZERO,
        }
    }

    /// A detector fed with a heartbeat every `every` for two seconds, polled every millisecond.
    fn trained(every: u64) -> (Detector, Moment) {
        let mut now = Moment(0);
        let mut detector = Detector::new(now, Limits::default());
        for ms in 1..=2000 {
            now = now + MS;
            if ms % every == 0 {
                detector.heard_beat(now, busy(ms));
            }
            assert_eq!(detector.poll(now), (Trust::Trusted, None));
        }
        (detector, now)
    }

    /// Polls every millisecond until the peer is suspected.
    fn silence_until_suspected(detector: &mut Detector, mut now: Moment) -> Duration {
        let start = now;
        loop {
            now = now + MS;
            if let (Trust::Suspected(evidence), _) = detector.poll(now) {
                assert!(matches!(evidence, Evidence::Silence(_)), "{evidence}");
                return now.since(start);
            }
            assert!(now.since(start) < Duration::from_secs(5), "never suspected");
        }
    }

    #[test]
    fn a_steady_peer_is_given_up_at_the_floor_and_one_lost_packet_is_nothing() {
        let (mut detector, now) = trained(5);
        assert_eq!(detector.timeout(), Limits::default().floor);
        // One packet lost: ten milliseconds pass between two.
        let mut now = now;
        for _ in 0..10 {
            now = now + MS;
            assert_eq!(detector.poll(now).0, Trust::Trusted);
        }
        detector.heard_log(now);
        assert_eq!(
            silence_until_suspected(&mut detector, now),
            Limits::default().floor
        );
    }

    #[test]
    fn a_halting_peer_gets_a_longer_timeout_within_the_ceiling() {
        let (mut detector, mut now) = trained(5);
        for gap in [60_u64, 5, 5, 5] {
            for _ in 0..gap {
                now = now + MS;
                detector.poll(now);
            }
            detector.heard_beat(now, busy(0));
        }
        assert!(detector.timeout() >= 115 * MS, "{:?}", detector.timeout());
        for _ in 0..3000 {
            now = now + MS;
            detector.poll(now);
        }
        detector.heard_beat(now, busy(0));
        assert_eq!(detector.timeout(), Limits::default().ceiling);
        let mut beats = 0;
        while detector.timeout() > Limits::default().floor {
            for _ in 0..5 {
                now = now + MS;
                detector.poll(now);
            }
            detector.heard_beat(now, busy(0));
            beats += 1;
        }
        assert!(
            (1000..3000).contains(&beats),
            "forgotten after {beats} heartbeats"
        );
    }

    #[test]
    fn patience_shrinks_with_every_heartbeat_until_enough_are_measured() {
        let limits = Limits::default();
        let mut detector = Detector::new(Moment(0), limits);
        let mut now = Moment(0);
        let mut before = limits.ceiling;
        for beat in 1..=LEARNING + 1 {
            for _ in 0..5 {
                now = now + MS;
                detector.poll(now);
            }
            detector.heard_beat(now, busy(u64::from(beat)));
            let timeout = detector.timeout();
            assert!(timeout <= before, "{timeout:?} after {before:?}");
            // The first one has nothing to be measured against.
            if beat == LEARNING / 2 + 1 {
                assert_eq!(timeout, (limits.floor + limits.ceiling) / 2);
            }
            before = timeout;
        }
        assert_eq!(before, limits.floor);
    }

    #[test]
    fn an_unmeasured_peer_has_the_whole_ceiling() {
        let mut detector = Detector::new(Moment(0), Limits::default());
        assert_eq!(
            silence_until_suspected(&mut detector, Moment(0)),
            Limits::default().ceiling
        );
    }

    #[test]
    fn log_traffic_counts_as_life_and_teaches_nothing() {
        let (mut detector, mut now) = trained(5);
        for _ in 0..100 {
            now = now + MS;
            detector.heard_log(now);
            assert_eq!(detector.poll(now).0, Trust::Trusted);
        }
        assert_eq!(detector.timeout(), Limits::default().floor);
    }

    #[test]
    fn doubt_comes_before_suspicion_and_passes() {
        let (mut detector, mut now) = trained(5);
        now = now + 15 * MS;
        assert_eq!(detector.poll(now).0, Trust::Doubted(15 * MS));
        detector.heard_beat(now, busy(0));
        assert_eq!(detector.poll(now).0, Trust::Trusted);
    }

    #[test]
    fn a_detector_that_slept_counts_afresh() {
        let (mut detector, now) = trained(5);
        let awake = now + Duration::from_secs(10);
        assert_eq!(
            detector.poll(awake),
            (Trust::Trusted, Some(Duration::from_secs(10)))
        );
        assert_eq!(
            silence_until_suspected(&mut detector, awake),
            Limits::default().floor
        );
    }

    #[test]
    fn what_piled_up_during_a_nap_is_not_measured() {
        let (mut detector, now) = trained(5);
        let awake = now + Duration::from_secs(10);
        for n in 0..100 {
            detector.heard_beat(awake, busy(n));
        }
        detector.poll(awake);
        detector.heard_beat(awake + 5 * MS, busy(200));
        assert_eq!(detector.timeout(), Limits::default().floor);
    }

    #[test]
    fn a_detector_that_always_sleeps_notices_all_the_same() {
        let (mut detector, mut now) = trained(5);
        let mut polls = 0;
        while !matches!(detector.poll(now).0, Trust::Suspected(_)) {
            now = now + 20 * MS;
            polls += 1;
            assert!(polls < 10, "never suspected");
        }
        assert!(polls > 3);
    }

    #[test]
    fn a_beating_peer_whose_vcpu_owes_work_and_stands_still_is_wedged() {
        let (mut detector, mut now) = trained(5);
        let mut verdict = Trust::Trusted;
        let start = now;
        while verdict == Trust::Trusted && now.since(start) < Duration::from_secs(5) {
            now = now + 5 * MS;
            detector.heard_beat(now, busy(7));
            verdict = detector.poll(now).0;
        }
        assert!(
            matches!(verdict, Trust::Suspected(Evidence::Wedged(_))),
            "{verdict:?}"
        );
        assert!(now.since(start) >= Limits::default().wedged);
    }

    #[test]
    fn a_guest_that_computes_or_halts_for_long_is_not_wedged() {
        let (mut detector, mut now) = trained(5);
        for _ in 0..2000 {
            now = now + 5 * MS;
            detector.heard_beat(
                now,
                Progress {
                    owes: false,
                    ..busy(7)
                },
            );
            assert_eq!(detector.poll(now).0, Trust::Trusted);
        }
    }

    #[test]
    fn a_clock_that_seems_to_go_back_does_no_harm() {
        let (mut detector, now) = trained(5);
        detector.heard_log(Moment(0));
        assert_eq!(detector.poll(Moment(0)).0, Trust::Trusted);
        assert_eq!(
            silence_until_suspected(&mut detector, now),
            Limits::default().floor
        );
    }

    #[test]
    fn a_vcpu_that_stands_in_line_for_a_cpu_is_not_wedged_but_not_trusted_for_ever() {
        let (mut detector, mut now) = trained(5);
        let start = now;
        let verdict = loop {
            now = now + 5 * MS;
            let stood = now.since(start).saturating_sub(50 * MS);
            detector.heard_beat(now, Progress { stood, ..busy(7) });
            match detector.poll(now).0 {
                Trust::Trusted => assert!(now.since(start) < Duration::from_secs(30)),
                other => break other,
            }
        };
        assert!(
            matches!(verdict, Trust::Suspected(Evidence::Wedged(_))),
            "{verdict:?}"
        );
        assert!(now.since(start) >= Limits::default().starved);
    }

    #[test]
    fn a_late_listener_allows_as_much_to_the_other_side() {
        // Both are on one busy host: this side has just been 14 ms late itself, which is no nap.
        let (mut detector, mut now) = trained(5);
        now = now + 14 * MS;
        detector.poll(now);
        detector.heard_beat(now, busy(0));
        let wide = Limits {
            floor: 20 * MS,
            ..Limits::default()
        };
        detector.limits = wide;
        assert!(detector.timeout() >= 28 * MS, "{:?}", detector.timeout());
        // It is forgotten within seconds of polls in time.
        for _ in 0..8000 {
            now = now + MS;
            detector.heard_log(now);
            detector.poll(now);
        }
        assert!(detector.own_worst < 2 * as_nanos(MS));
    }

    /// What happens to a pair's link and hosts: (gap to the next heartbeat, in ms; how late this side polls after it, in ms).
    fn histories() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((1..400_u64, 0..60_u64), 1..300)
    }

    fn live_through(detector: &mut Detector, history: &[(u64, u64)]) -> Moment {
        let mut now = Moment(0);
        for (turn, (gap, late)) in history.iter().enumerate() {
            for _ in 0..*gap {
                now = now + MS;
                detector.poll(now);
            }
            now = now + Duration::from_millis(*late);
            detector.heard_beat(now, busy(turn as u64));
            detector.poll(now);
        }
        now
    }

    proptest! {
        #[test]
        fn the_timeout_keeps_its_bounds(history in histories()) {
            let mut detector = Detector::new(Moment(0), Limits::default());
            live_through(&mut detector, &history);
            let timeout = detector.timeout();
            prop_assert!(timeout >= Limits::default().floor && timeout <= Limits::default().ceiling);
        }

        /// Whatever came before, a peer that falls silent is given up within the ceiling of a side that polls in time.
        #[test]
        fn a_silent_peer_is_always_given_up(history in histories()) {
            let mut detector = Detector::new(Moment(0), Limits::default());
            let now = live_through(&mut detector, &history);
            let took = silence_until_suspected(&mut detector, now);
            prop_assert!(took <= Limits::default().ceiling, "{took:?}");
        }

        /// Whatever came before, a peer whose heartbeats come within the floor is not given up.
        #[test]
        fn a_peer_that_is_heard_within_the_floor_is_never_given_up(
            history in histories(),
            gaps in prop::collection::vec(1..30_u64, 1..300),
        ) {
            let mut detector = Detector::new(Moment(0), Limits::default());
            let mut now = live_through(&mut detector, &history);
            for (turn, gap) in gaps.into_iter().enumerate() {
                for _ in 1..gap {
                    now = now + MS;
                    let trust = detector.poll(now).0;
                    prop_assert!(!matches!(trust, Trust::Suspected(_)), "{trust:?}");
                }
                now = now + MS;
                detector.heard_beat(now, busy(1000 + turn as u64));
                let trust = detector.poll(now).0;
                prop_assert!(!matches!(trust, Trust::Suspected(_)), "{trust:?}");
            }
        }

        /// A peer that was silent for some time and came back is not given up the next time that it is silent for as long.
        #[test]
        fn a_hiccup_that_was_survived_once_is_survived_again(hiccup in 6..149_u64) {
            let (mut detector, mut now) = trained(5);
            detector.limits.floor = 150 * MS;
            for round in 0..2 {
                for _ in 0..hiccup {
                    now = now + MS;
                    let trust = detector.poll(now).0;
                    prop_assert!(!matches!(trust, Trust::Suspected(_)), "{round}: {trust:?}");
                }
                detector.heard_beat(now, busy(3000 + round));
                // From here on even with a floor far below.
                detector.limits.floor = 5 * MS;
            }
        }
    }
}
