# The app in a container: docker build -t vilex . && docker run --rm -p 7860:7860 vilex
FROM python:3.11-slim

# Debian's slim image has no OpenMP runtime, which ncnn and torch load
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home artist
WORKDIR /home/artist/vilex
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=artist . .

USER artist
ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860
EXPOSE 7860
HEALTHCHECK --start-period=120s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:7860', timeout=5)"
CMD ["python", "app.py"]
