//! Correct histories, and wrong ones that the judge must reject.

use super::*;

/// Times of a history that begins at second 1 of the system's clock, in milliseconds.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn instant(&self, at: u64) -> Instant {
        self.0 + Duration::from_millis(at)
    }

    fn visit(&self, sent: u64, ended: u64, outcome: Outcome) -> Visit {
        Visit {
            client: 0,
            replica: 0,
            sent: self.instant(sent),
            sent_at: row(sent),
            ended: self.instant(ended),
            outcome,
            total: None,
            redis: None,
        }
    }

    fn recorded(&self, sent: u64, ended: u64, total: i64, redis: Option<i64>) -> Visit {
        Visit {
            total: Some(total),
            redis,
            ..self.visit(sent, ended, Outcome::Recorded)
        }
    }
}

/// The time of the row of a visit that arrived at `at`.
fn row(at: u64) -> i64 {
    1_000_000 + i64::try_from(at).unwrap() * 1000
}

fn verdict(visits: &[Visit], rows: &[i64]) -> Verdict {
    verdict_with(visits, rows, &[])
}

fn verdict_with(visits: &[Visit], rows: &[i64], redis_outages: &[Range<Instant>]) -> Verdict {
    judge(History {
        visits,
        rows,
        redis_outages,
    })
}

#[test]
fn correct_history_has_no_violation() {
    let clock = Clock::start();
    // The second and the third visit overlap, so that either can be first, in each store.
    let visits = [
        clock.recorded(0, 10, 1, Some(1)),
        clock.recorded(20, 40, 3, Some(2)),
        clock.recorded(30, 50, 2, Some(3)),
        clock.visit(60, 70, Outcome::Refused),
        clock.visit(60, 70, Outcome::NotSent),
    ];
    let expected = Verdict {
        recorded: 3,
        rows: 3,
        ..Verdict::default()
    };
    let found = verdict(&visits, &[row(1), row(31), row(21)]);
    assert_eq!((found, found.violations()), (expected, 0));
}

#[test]
fn recorded_visit_without_a_row_is_lost() {
    let clock = Clock::start();
    let visits = [
        clock.recorded(0, 10, 1, Some(1)),
        clock.recorded(200, 210, 2, Some(2)),
    ];
    assert_eq!(verdict(&visits, &[row(0)]).lost, 1);
    // The second row has another time: it is the row of another visit.
    assert_eq!(verdict(&visits, &[row(0), row(400)]).lost, 1);
    assert_eq!(verdict(&visits, &[row(0), row(205)]).violations(), 0);
}

#[test]
fn number_returned_twice_by_postgres_is_repeated() {
    let clock = Clock::start();
    let visits = [
        clock.recorded(0, 10, 1, Some(1)),
        clock.recorded(5, 15, 1, Some(2)),
    ];
    let found = verdict(&visits, &[row(5), row(5)]);
    assert_eq!(found.postgres.repeated, 1);
}

#[test]
fn batch_recorded_twice_is_unexplained() {
    let clock = Clock::start();
    // The first copy of the batch has the numbers 1 and 2, and its visits got 3 and 4.
    let visits = [
        clock.recorded(0, 10, 3, Some(1)),
        clock.recorded(0, 10, 4, Some(2)),
        clock.visit(0, 10, Outcome::Refused),
        clock.visit(0, 10, Outcome::NotSent),
    ];
    let found = verdict(&visits, &[row(1), row(2), row(1), row(2)]);
    assert_eq!(found.postgres.unexplained, 2);
}

#[test]
fn each_row_without_a_recorded_visit_needs_a_visit_in_doubt_of_its_own() {
    let clock = Clock::start();
    let unexplained = |visits: &[Visit], rows: &[i64]| verdict(visits, rows).postgres.unexplained;
    for outcome in [
        Outcome::InDoubt,
        Outcome::NoResponse,
        Outcome::Left,
        Outcome::Wrong(500),
    ] {
        let visit = clock.visit(0, 100, outcome);
        assert_eq!(unexplained(&[visit], &[row(50)]), 0, "{outcome:?}");
        assert_eq!(unexplained(&[visit], &[row(50), row(50)]), 1, "{outcome:?}");
        assert_eq!(unexplained(&[visit], &[row(500)]), 1, "{outcome:?}");
    }
    // One visit can have made either row, the other one only the second row.
    let long = clock.visit(0, 1000, Outcome::InDoubt);
    let short = clock.visit(0, 100, Outcome::InDoubt);
    assert_eq!(unexplained(&[long, short], &[row(50), row(900)]), 0);
}

#[test]
fn gap_without_a_visit_in_doubt_is_found() {
    let clock = Clock::start();
    let first = clock.recorded(0, 10, 1, Some(1));
    let third = clock.recorded(20, 30, 3, Some(3));
    let found = verdict(&[first, third], &[row(5), row(15), row(25)]);
    assert_eq!((found.lost, found.postgres.unexplained), (0, 1));
    assert_eq!(found.redis.unexplained, 1);
    // The number was skipped: there is no row either.
    let found = verdict(&[first, third], &[row(5), row(25)]);
    assert_eq!(found.lost, 1);
    let doubt = clock.visit(12, 18, Outcome::NoResponse);
    let found = verdict(&[first, doubt, third], &[row(5), row(15), row(25)]);
    assert_eq!((found.violations(), found.in_doubt), (0, 1));
}

#[test]
fn number_below_that_of_an_earlier_visit_is_out_of_order() {
    let clock = Clock::start();
    let visits = [
        clock.recorded(0, 10, 2, Some(1)),
        clock.recorded(11, 20, 1, Some(2)),
    ];
    let found = verdict(&visits, &[row(12), row(8)]);
    assert_eq!(found.postgres.out_of_order, 1);
    assert_eq!(found.redis.out_of_order, 0);
    let visits = [
        clock.recorded(0, 10, 1, Some(2)),
        clock.recorded(11, 20, 2, Some(1)),
    ];
    let found = verdict(&visits, &[row(5), row(15)]);
    assert_eq!(found.postgres.out_of_order, 0);
    assert_eq!(found.redis.out_of_order, 1);
}

#[test]
fn earliest_end_above_decides_and_not_the_nearest() {
    let clock = Clock::start();
    // 3 ended before 1 was sent, although 2 did not.
    let visits = [
        clock.recorded(0, 10, 3, None),
        clock.recorded(0, 50, 2, None),
        clock.recorded(20, 30, 1, None),
    ];
    let found = verdict(&visits, &[row(25), row(25), row(5)]);
    assert_eq!(found.postgres.out_of_order, 1);
}

#[test]
fn same_number_as_an_earlier_visit_is_out_of_order() {
    let clock = Clock::start();
    let visits = [
        clock.recorded(20, 30, 1, None),
        clock.recorded(0, 10, 1, None),
    ];
    let found = verdict(&visits, &[row(25)]);
    assert_eq!(found.postgres.out_of_order, 1);
    assert_eq!(found.postgres.repeated, 1);
}

#[test]
fn replicas_have_one_order() {
    let clock = Clock::start();
    let stale = Visit {
        replica: 1,
        ..clock.recorded(20, 30, 1, None)
    };
    let visits = [clock.recorded(0, 10, 2, None), stale];
    let found = verdict(&visits, &[row(25), row(5)]);
    assert_eq!(found.postgres.out_of_order, 1);
}

#[test]
fn number_in_redis_is_repeated_within_one_life_only() {
    let clock = Clock::start();
    let outage = clock.instant(100)..clock.instant(200);
    let visits = |second: u64| {
        [
            clock.recorded(0, 10, 1, Some(1)),
            clock.recorded(second, second + 10, 2, Some(1)),
        ]
    };
    let found = |second: u64, outages: &[Range<Instant>]| {
        verdict_with(&visits(second), &[row(5), row(second)], outages).redis
    };
    let outages = [outage];
    assert_eq!(found(50, &outages).repeated, 1);
    assert_eq!(found(50, &outages).out_of_order, 1);
    assert_eq!(found(300, &[]).repeated, 1);
    assert_eq!(found(300, &outages), Numbers::default());
    // Sent during the outage: it has a number, so it was counted after the outage.
    assert_eq!(found(195, &outages), Numbers::default());
}

#[test]
fn number_returned_while_redis_was_down_is_unexplained() {
    let clock = Clock::start();
    let outages = [clock.instant(100)..clock.instant(200)];
    let visits = [clock.recorded(110, 120, 1, Some(1))];
    let found = verdict_with(&visits, &[row(115)], &outages);
    assert_eq!(found.redis.unexplained, 1);
}

#[test]
fn visit_that_spans_two_lives_of_redis_is_of_either() {
    let clock = Clock::start();
    let outages = [clock.instant(100)..clock.instant(200)];
    let visits = [
        clock.recorded(0, 10, 1, Some(1)),
        clock.recorded(90, 210, 2, Some(1)),
        clock.recorded(220, 230, 3, Some(2)),
    ];
    let found = verdict_with(&visits, &[row(5), row(95), row(225)], &outages);
    assert_eq!(found.violations(), 0);
}

#[test]
fn visit_whose_client_left_is_counted_after_the_restart_of_redis() {
    let clock = Clock::start();
    let outages = [clock.instant(5000)..clock.instant(5100)];
    let found = |left: u64| {
        let visits = [
            clock.recorded(0, 10, 1, Some(1)),
            clock.visit(left, left + 5, Outcome::Left),
            clock.recorded(5120, 5130, 3, Some(2)),
        ];
        verdict_with(&visits, &[row(5), row(left), row(5125)], &outages).redis
    };
    assert_eq!(found(5090), Numbers::default());
    assert_eq!(found(1000).unexplained, 1, "long before the restart");
}

#[test]
fn number_missing_in_redis_is_explained_by_a_visit_without_a_number() {
    let clock = Clock::start();
    let second = |redis| {
        let visits = [
            clock.recorded(0, 10, 1, Some(1)),
            clock.recorded(20, 30, 2, redis),
            clock.recorded(40, 50, 3, Some(3)),
        ];
        verdict(&visits, &[row(5), row(25), row(45)]).redis
    };
    assert_eq!(second(None), Numbers::default());
    assert_eq!(second(Some(2)), Numbers::default());
    // A refused visit is not counted.
    let visits = [
        clock.recorded(0, 10, 1, Some(1)),
        clock.visit(20, 30, Outcome::Refused),
        clock.recorded(40, 50, 2, Some(3)),
    ];
    assert_eq!(verdict(&visits, &[row(5), row(45)]).redis.unexplained, 1);
}

#[test]
fn response_after_a_power_cut_is_hidden() {
    let clock = Clock::start();
    let power = PowerCut {
        cut: clock.instant(10),
        off: clock.instant(20),
    };
    let times = [(8, 9), (9, 11), (19, 21), (21, 22)];
    let mut visits = times.map(|(sent, ended)| clock.recorded(sent, ended, 1, Some(1)));
    power.hide(&mut visits);
    let recorded = visits.map(|visit| visit.is_recorded());
    assert_eq!(recorded, [true, false, false, true]);
}
