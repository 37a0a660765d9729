//! A tiny HTTP server on the loopback interface that misbehaves on request.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What the server does with a request.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// The content, or the part of it that a range asks for.
    Whole,
    /// The same, but the connection ends after this many bytes of the body.
    Cut(usize),
    /// The whole content, whatever the request asks for.
    NoRange,
    /// [`Answer::NoRange`], cut.
    NoRangeCut(usize),
    /// Status 206 with another range than was asked for.
    WrongRange,
    /// Only this status.
    Status(u16),
}

/// A running server; it ends with the process.
pub struct Server {
    address: String,
    ranges: Arc<Mutex<Vec<Option<String>>>>,
}

impl Server {
    /// Serves `content` under every path; `script` answers the first requests, [`Answer::Whole`]
    /// (or [`Answer::NoRange`] after a script that ends with it) all others.
    pub fn start(content: Vec<u8>, script: &[Answer]) -> Self {
        // A proxy of the machine must not see these requests.
        std::env::set_var("NO_PROXY", "127.0.0.1");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let ranges = Arc::new(Mutex::new(Vec::new()));
        let seen = ranges.clone();
        let mut script: VecDeque<Answer> = script.iter().copied().collect();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = script.pop_front().unwrap_or(Answer::Whole);
                serve(stream.unwrap(), &content, answer, &seen);
            }
        });
        Self { address, ranges }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// The `Range` header of each request so far.
    pub fn ranges(&self) -> Vec<Option<String>> {
        self.ranges.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, content: &[u8], answer: Answer, seen: &Mutex<Vec<Option<String>>>) {
    let mut range = None;
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let line = line.unwrap().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("range: bytes=") {
            range = Some(value.to_string());
        }
        if line.is_empty() {
            break;
        }
    }
    seen.lock().unwrap().push(range.clone());
    let total = content.len();
    let start: usize = range.map_or(0, |r| r.trim_end_matches('-').parse().unwrap());
    let head = |status: &str, more: &str, length: usize| {
        format!("HTTP/1.1 {status}\r\n{more}Content-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    let partial = |from: usize| format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1);
    let (head, body) = match answer {
        Answer::Status(code) => (head(&format!("{code} Nope"), "", 0), &content[..0]),
        Answer::NoRange | Answer::NoRangeCut(_) => (head("200 OK", "", total), content),
        Answer::WrongRange => (
            head(
                "206 Partial Content",
                &partial(start + 1),
                total - start - 1,
            ),
            &content[start + 1..],
        ),
        Answer::Whole | Answer::Cut(_) if start == 0 => (head("200 OK", "", total), content),
        Answer::Whole | Answer::Cut(_) if start >= total => (
            head(
                "416 Range Not Satisfiable",
                &format!("Content-Range: bytes */{total}\r\n"),
                0,
            ),
            &content[..0],
        ),
        Answer::Whole | Answer::Cut(_) => (
            head("206 Partial Content", &partial(start), total - start),
            &content[start..],
        ),
    };
    let body = match answer {
        Answer::Cut(n) | Answer::NoRangeCut(n) => &body[..n.min(body.len())],
        _ => body,
    };
    // A client that hangs up early is not the server's problem.
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body));
}
