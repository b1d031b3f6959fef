//! Claims of the fault proxy, over real sockets.

use super::*;
use tokio::time::timeout;

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

struct Line {
    address: SocketAddr,
    there: Direction,
    back: Direction,
    shutdown: CancellationToken,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn line(target: SocketAddr, there: Duration, back: Duration) -> Line {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (there, back) = (Direction::new(there), Direction::new(back));
    let shutdown = CancellationToken::new();
    tokio::spawn(serve(listener, target, there.clone(), back.clone(), shutdown.clone()));
    Line { address, there, back, shutdown }
}

/// A server that sends back what it receives.
async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
                write.shutdown().await.ok();
            });
        }
    });
    address
}

async fn ping(stream: &mut TcpStream, text: &[u8]) -> io::Result<Duration> {
    let sent = Instant::now();
    stream.write_all(text).await?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await?;
    assert_eq!(answer, text);
    Ok(sent.elapsed())
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test]
async fn a_round_trip_takes_the_delays_of_both_directions() {
    let line = line(echo_server().await, millis(30), millis(50)).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();

    let took = timeout(PATIENCE, ping(&mut stream, b"hello")).await.unwrap().unwrap();

    assert!(took >= millis(80), "{took:?}");
}

#[tokio::test]
async fn delay_costs_no_bandwidth_and_keeps_order() {
    let line = line(echo_server().await, millis(100), millis(100)).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();
    let sent: Vec<u8> = (0u32..500_000).flat_map(u32::to_le_bytes).collect();

    let begun = Instant::now();
    let (mut read, mut write) = stream.split();
    let mut received = Vec::new();
    let both = async {
        tokio::join!(
            async {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            },
            async { read.read_to_end(&mut received).await.unwrap() }
        )
    };
    timeout(PATIENCE, both).await.unwrap();

    assert!(received == sent, "bytes changed or moved");
    // One chunk of 64 KiB per round trip would take six seconds and more.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn order_holds_when_the_delay_shrinks_while_bytes_are_under_way() {
    let line = line(echo_server().await, millis(200), Duration::ZERO).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();

    stream.write_all(b"first ").await.unwrap();
    timeout(PATIENCE, async {
        while line.there.queued_bytes() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    line.there.set_delay(Duration::ZERO);
    stream.write_all(b"second").await.unwrap();

    let mut answer = [0; 12];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"first second");
}

#[tokio::test]
async fn a_black_hole_stalls_old_and_new_connections_and_healing_ends_them() {
    let line = line(echo_server().await, Duration::ZERO, Duration::ZERO).await;
    let mut old = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut old, b"before")).await.unwrap().unwrap();

    line.there.set_mode(Mode::Blackhole);
    line.back.set_mode(Mode::Blackhole);
    let mut new = TcpStream::connect(line.address).await.unwrap();
    for stream in [&mut old, &mut new] {
        assert!(timeout(millis(150), ping(stream, b"cut")).await.is_err(), "bytes passed a cut");
    }

    line.there.set_mode(Mode::Pass);
    line.back.set_mode(Mode::Pass);
    for stream in [&mut old, &mut new] {
        let mut byte = [0];
        let ended = timeout(PATIENCE, stream.read(&mut byte)).await.unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
    let mut fresh = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut fresh, b"after")).await.unwrap().unwrap();
    assert_eq!(line.there.queued_bytes(), 0);
}

#[tokio::test]
async fn a_cut_of_one_direction_lets_the_other_pass() {
    let line = line(echo_server().await, Duration::ZERO, Duration::ZERO).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut stream, b"before")).await.unwrap().unwrap();
    let reached_target = line.there.delivered_bytes();

    line.back.set_mode(Mode::Blackhole);
    stream.write_all(b"request").await.unwrap();

    timeout(PATIENCE, async {
        while line.there.delivered_bytes() < reached_target + 7 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let mut byte = [0];
    assert!(timeout(millis(150), stream.read(&mut byte)).await.is_err(), "an answer passed");
}

#[tokio::test]
async fn reset_ends_old_connections_and_refuses_new_ones() {
    let line = line(echo_server().await, Duration::ZERO, Duration::ZERO).await;
    let mut old = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut old, b"before")).await.unwrap().unwrap();

    line.there.set_mode(Mode::Reset);

    let mut byte = [0];
    let ended = timeout(PATIENCE, old.read(&mut byte)).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let refused = timeout(PATIENCE, async {
        let mut new = TcpStream::connect(line.address).await?;
        ping(&mut new, b"cut").await
    });
    assert!(refused.await.unwrap().is_err());
}

#[tokio::test]
async fn memory_is_bounded_when_nobody_takes_the_bytes() {
    let line = line(echo_server().await, Duration::ZERO, Duration::ZERO).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut stream, b"before")).await.unwrap().unwrap();
    line.there.set_mode(Mode::Blackhole);

    // Far more than the queue and the socket buffers hold together.
    let flood = vec![7; 256 << 20];
    let stuck = timeout(Duration::from_secs(2), stream.write_all(&flood)).await;

    assert!(stuck.is_err(), "the proxy swallowed {} bytes", flood.len());
    assert!(line.there.queued_bytes() > 0);
    assert!(line.there.queued_bytes() <= u64::from(QUEUE_BYTES));
}

#[tokio::test]
async fn a_target_that_does_not_listen_resets_the_connection() {
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let line = line(nobody, Duration::ZERO, Duration::ZERO).await;

    let mut stream = TcpStream::connect(line.address).await.unwrap();
    let mut byte = [0];
    let ended = timeout(PATIENCE, stream.read(&mut byte)).await.unwrap();

    assert!(ended.is_err(), "{ended:?}");
}

#[tokio::test]
async fn shutdown_ends_connections_and_frees_the_port() {
    let line = line(echo_server().await, Duration::ZERO, Duration::ZERO).await;
    let mut stream = TcpStream::connect(line.address).await.unwrap();
    timeout(PATIENCE, ping(&mut stream, b"before")).await.unwrap().unwrap();

    line.shutdown.cancel();

    let mut byte = [0];
    let ended = timeout(PATIENCE, stream.read(&mut byte)).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    timeout(PATIENCE, async {
        while TcpListener::bind(line.address).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}
