//! What the switch reads of a packet: where it comes from and where it goes.

use std::net::Ipv4Addr;

/// The addresses of an IPv4 packet; none of anything else.
pub(crate) fn addresses(packet: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let address = |at: usize| {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes))
    };
    if packet.first()? >> 4 != 4 {
        return None;
    }
    Some((address(12)?, address(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_ipv4_headers_have_addresses() {
        let mut packet = vec![0u8; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&[10, 77, 1, 1]);
        packet[16..20].copy_from_slice(&[10, 77, 2, 3]);

        let expected = (Ipv4Addr::new(10, 77, 1, 1), Ipv4Addr::new(10, 77, 2, 3));
        assert_eq!(addresses(&packet), Some(expected));
        assert_eq!(addresses(&packet[..19]), None);
        packet[0] = 0x60;
        assert_eq!(addresses(&packet), None);
        assert_eq!(addresses(&[]), None);
    }
}
