//! `pulsar events`.

use super::Place;
use super::cluster::unexpected;
use crate::control::{Answer, Request};
use crate::events::Event;
use crate::failure::{Context, Outcome};
use crate::status::SCHEMA_VERSION;
use clap::Args;
use std::io::Write;
use std::time::Duration;

/// `pulsar events`.
#[derive(Clone, Debug, Args)]
pub(super) struct EventsArgs {
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
    /// Wait for more, until interrupted
    #[arg(long, short = 'f')]
    pub follow: bool,
}

pub(super) fn run(place: &Place, args: &EventsArgs) -> Outcome<u8> {
    let idle = if args.follow { Duration::from_secs(u64::from(u32::MAX)) } else { Duration::from_secs(2) };
    let last = place.client()?.call_with(Request::Events { since: 0, follow: args.follow }, None, idle, |answer| {
        if let Answer::Event(event) = answer
            && show(&event, args.json).is_err()
        {
            // The reader has gone; nobody waits for more.
            std::process::exit(0);
        }
    })?;
    match last {
        Answer::EndOfEvents => Ok(0),
        other => Err(unexpected(&other)),
    }
}

fn show(event: &Event, json: bool) -> Outcome<()> {
    let line = if json {
        let mut value = serde_json::to_value(event).context(|| "cannot make JSON".into())?;
        value["schema_version"] = SCHEMA_VERSION.into();
        value.to_string()
    } else {
        format!("{} e{} {} {}", utc(event.time_ms), event.epoch, if event.bad { "!" } else { " " }, event.text)
    };
    writeln!(std::io::stdout(), "{line}").context(|| "cannot write".into())
}

/// `2026-11-21T03:51:32.123Z`.
fn utc(ms: u64) -> String {
    let (days, day_ms) = (ms / 86_400_000, ms % 86_400_000);
    // Civil date from days since 1970, by eras of 400 years (146,097 days) that begin on 1 March.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let s = day_ms / 1000;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z", s / 3600, s / 60 % 60, s % 60, day_ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400_123), "2000-02-29T00:00:00.123Z");
        assert_eq!(utc(1_795_233_092_000), "2026-11-21T03:51:32.000Z");
    }
}
