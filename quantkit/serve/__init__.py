"""``quantkit serve``: an HTTP server that OpenAI's clients understand, and a page to try models on.

    app.py       the routes                          schemas.py   what may be asked, checked
    guard.py     who may ask                         prompts.py   messages -> token ids
    answer.py    token ids -> text, choices          bodies.py    the JSON that goes back
    engine.py    what an engine is                   worker.py    a thread that runs one
    engines/     torch, llama.cpp, vLLM              model.py     a model that is being served

A request goes down this list once: checked, turned into token ids, handed to an engine; its tokens
come back as a stream and become text. Engines know tokens only, so that stop strings, characters of
several tokens, choices and the format of the answer exist once, whatever computes.
"""
