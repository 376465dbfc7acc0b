//! Sizes as people write and read them: `8G`, `512M`, `1.5T` (powers of 1024).

use std::str::FromStr;

/// A number of bytes, read from `8G`, `8GiB`, `512M`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(&str, u32); 5] = [("K", 10), ("M", 20), ("G", 30), ("T", 40), ("P", 50)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let bad = || format!("'{text}' is not a size; write 512M, 8G, 1.5T or a number of bytes");
        let upper = text.trim().to_ascii_uppercase();
        let body = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
        let (number, shift) = match UNITS.iter().find(|(unit, _)| body.ends_with(unit)) {
            Some((unit, shift)) => (&body[..body.len() - unit.len()], *shift),
            None => (body, 0),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Size).ok_or_else(bad);
        }
        match number.parse::<f64>() {
            Ok(n) if n.is_finite() && n >= 0.0 && n * ((1u64 << shift) as f64) < 9e18 => {
                Ok(Size((n * (1u64 << shift) as f64) as u64))
            }
            _ => Err(bad()),
        }
    }
}

/// `8.0 GiB`, `12 KiB`, `0 B`.
#[must_use]
pub fn human(bytes: u64) -> String {
    for (unit, shift) in UNITS.iter().rev() {
        let one = 1u64 << shift;
        if bytes >= one {
            let n = bytes as f64 / one as f64;
            return if n >= 100.0 { format!("{n:.0} {unit}iB") } else { format!("{n:.1} {unit}iB") };
        }
    }
    format!("{bytes} B")
}

/// `3 s`, `4 min`, `2 h 5 min`, `3 d`.
#[must_use]
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_shown() {
        assert_eq!("8G".parse(), Ok(Size(8 << 30)));
        assert_eq!("8GiB".parse(), Ok(Size(8 << 30)));
        assert_eq!("1.5m".parse(), Ok(Size(3 << 19)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert!("8X".parse::<Size>().is_err());
        assert!("-1G".parse::<Size>().is_err());
        assert!("99999999P".parse::<Size>().is_err());
        assert_eq!(human(8 << 30), "8.0 GiB");
        assert_eq!(human(0), "0 B");
        assert_eq!(duration(7500), "2 h 5 min");
    }
}
